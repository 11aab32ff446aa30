"""What a script is told of how it talks to its site."""

from __future__ import annotations

import fedbio.client as flare

from .at_hand import AtHand, here  # noqa: F401


def test_config_has_the_keys_that_scripts_of_nvflare_look_up(here: AtHand) -> None:  # noqa: F811
    flare.init()
    assert flare.get_config() == {
        "SITE_NAME": "site-1",
        "JOB_ID": "job-1",
        "TASK_EXCHANGE": {
            "train_task_name": "train",
            "eval_task_name": "evaluate",
            "submit_model_task_name": "submit_model",
            "exchange_format": "pytorch",
            "transfer_type": "FULL",
        },
    }
