"""What the libraries say while they are imported and set up, which tells a user nothing: it is left unsaid.

`stages` imports this first, so it holds in scripts, notebooks and every process of a run. All other warnings stay.
"""

import logging
from functools import partial

# Of transformers, about image processors that diffusers names and no stage uses; of diffusers, about its guiders, and
# about parts of a pipeline that a plan makes without their weights.
REMARKS = {
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back to",
    "diffusers.guiders.guider_utils": "Guiders are currently an experimental feature",
    "diffusers.modular_pipelines.modular_pipeline_utils": "Component was not created using `ComponentSpec`",
}


def leave_out() -> None:
    """Keep these remarks out of what the libraries log."""
    for name, remark in REMARKS.items():
        logging.getLogger(name).addFilter(partial(_is_other, remark))


def _is_other(remark: str, record: logging.LogRecord) -> bool:
    return remark not in record.getMessage()
