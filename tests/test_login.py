"""A token is asked for where a gated model needs one, and nowhere else."""

import json
from pathlib import Path

from tests.test_hub import TOKEN, Hub, home, hub, started

__all__ = ["home", "hub"]
CODE = """
import getpass, json, os, sys

asked, said = [], []

def typed(text):
    asked.append(text)
    if answer is None:
        raise NotImplementedError("no frontend")
    return answer

getpass.getpass = typed
import stagerun

for model, token, answer in json.loads(sys.argv[1]):
    asked.clear()
    os.environ.pop("HF_TOKEN", None)
    os.environ |= {"HF_TOKEN": token} if token else {}
    try:
        stagerun.log_in(model)
        refused = ""
    except stagerun.StagerunError as error:
        refused = f"{type(error).__name__} {error}"
    said.append([*asked, refused, os.environ.get("HF_TOKEN", "")])
# None of them is told where a test would show it.
print(json.dumps([[*texts, token[::-1]] for *texts, token in said]))
"""
ASKED = "org/gated is gated. An access token of an account that accepted its license: "


def test_a_token_is_asked_for_where_a_gated_model_needs_one(hub: Hub, home: Path, flux: Path) -> None:
    another = TOKEN.replace("Sentinel", "another")
    cases = [("demo", "", "hf_good"), (str(flux), "", "hf_good"), ("org/open", "", "hf_good"),
             ("org/gated", TOKEN, "hf_good"), ("org/gated", "", ""), ("org/gated", "", None),
             ("org/gated", "", another), ("org/gated", "", " hf_good "), ("org/gated", "hf_good", None)]
    done = started(["-c", CODE, json.dumps(cases)], hub, home)
    assert done.returncode == 0, done.stderr
    demo, folder, opened, given, empty, nobody, wrong, right, again = json.loads(done.stdout)
    assert demo == folder == opened == ["", ""] and given == ["", TOKEN[::-1]]
    assert empty == nobody and empty[0] == ASKED and empty[2] == ""
    assert empty[1].startswith("InvalidInput org/gated is gated, and no access token was typed -> make one at https://")
    assert wrong[:1] == [ASKED] and wrong[1].startswith("OutOfReach org/gated is gated: 1. accept its license")
    assert right == [ASKED, "", "hf_good"[::-1]] and again == ["", "hf_good"[::-1]]
    assert not (home / "token").exists() and not [file for file in hub.fetched if file.endswith(".safetensors")]
