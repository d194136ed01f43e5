"""The access token of a gated model, asked for where there is none: in a notebook, which has no shell beside it."""

import os
from getpass import getpass

from huggingface_hub import get_token
from huggingface_hub.errors import GatedRepoError

from runner.pipeline.model import as_name, family_named, unknown
from stages.errors import InvalidInput, ModelError
from stages.models.checkpoint import find
from stages.models.hub import is_id
from stages.signatures import checked_call


@checked_call
def log_in(model: str | os.PathLike[str]) -> None:
    """Ask for an access token of the hub, if the model is gated and there is none yet.

    `model` is what a pipeline is made of: the name of a family, a hub id or a folder. Nobody is asked where the model
    is on the disk, is open to all, or a token is there (HF_TOKEN, or that of `hf auth login`). What is typed is kept
    in HF_TOKEN alone, for this process and those that it starts. Of the model come configs and headers, which a plan
    needs.

    Raises ModelError where the token gives no access, and InvalidInput where nobody can be asked, or for what is no
    model.
    """
    name = as_name(model)
    family = family_named(name)
    name = name if family is None else family.repo
    if os.path.exists(os.path.expanduser(name)) or (family is not None and not is_id(name)):
        return
    if not is_id(name):
        raise unknown(name)
    if get_token():
        return
    try:
        find(name, weights=False)
    except ModelError as error:
        if not isinstance(error.__cause__, GatedRepoError):
            raise
        os.environ["HF_TOKEN"] = _asked(name)
        find(name, weights=False)


def _asked(model: str) -> str:
    try:
        token = getpass(f"{model} is gated. An access token of an account that accepted its license: ").strip()
    except (EOFError, NotImplementedError):
        token = ""
    if not token:
        raise InvalidInput(f"{model} is gated, and no access token was typed -> make one at "
                           f"https://huggingface.co/settings/tokens, and set HF_TOKEN to it before this")
    return token
