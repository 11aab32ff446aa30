"""What a training script imports to take part in a federation: ``import fedbio.client as flare``."""
