"""The measured rate of the disk, and what a stage reads from it."""

from pathlib import Path

from runner import Job, Request, make_plan
from runner.planning.disk import SAMPLE, read_rate, stored


def test_a_rate_is_measured_on_the_largest_file(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 100)
    (tmp_path / "large").write_bytes(bytes(2 * 2**20))
    rate = read_rate([tmp_path / "small", tmp_path / "large"])
    assert rate is not None and 2**20 < rate < 2**40
    assert SAMPLE == 128 * 2**20


def test_nothing_is_measured_where_there_is_nothing(tmp_path: Path) -> None:
    assert read_rate([]) is None
    (tmp_path / "empty").touch()
    assert read_rate([tmp_path / "empty"]) is None


def test_stages_read_their_own_files(flux: Path) -> None:
    job = make_plan(Job("flux", [Request("a red circle", 64, 48, 1, 3.5, 7, 32)], model=flux, devices=["cpu"]))
    size = {name: sum(file.stat().st_size for file in (flux / name).glob("*.safetensors")) for _, name in job.places}
    assert stored(job.stages) == {
        "encode": size["text_encoder"] + size["text_encoder_2"], "denoise": size["transformer"], "decode": size["vae"],
    }
