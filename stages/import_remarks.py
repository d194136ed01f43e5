"""What the libraries say of themselves while they are imported, which tells a user nothing: it is left unsaid.

`stages` imports this first, so it holds in scripts, notebooks and every process of a run. All other warnings stay.
"""

import logging
from functools import partial

# Of transformers, about image processors that diffusers names and no stage uses; of diffusers, about its guiders.
REMARKS = {
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back to",
    "diffusers.guiders.guider_utils": "Guiders are currently an experimental feature",
}


def leave_out() -> None:
    """Keep these remarks out of what the libraries log."""
    for name, remark in REMARKS.items():
        logging.getLogger(name).addFilter(partial(_is_other, remark))


def _is_other(remark: str, record: logging.LogRecord) -> bool:
    return remark not in record.getMessage()
