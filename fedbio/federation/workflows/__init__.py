"""Controllers, one file per federated computation."""
