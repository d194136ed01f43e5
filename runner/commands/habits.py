"""What people type who come from diffusers or from other programs, and what to type here in its place."""

from collections.abc import Collection, Mapping

from runner.reports.repeat import line

# By the option here, with a value where it takes one, what others call it.
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "--steps": ("num-inference-steps", "inference-steps", "num-steps", "n-steps", "sampling-steps", "ddim-steps",
                "sample-steps", "iterations"),
    "--guidance": ("guidance-scale", "true-cfg-scale", "cfg", "cfg-scale", "scale", "cfg-guidance"),
    "--count": ("num-images-per-prompt", "num-images", "num-outputs", "num-samples", "n-samples", "n-iter",
                "batch-size", "batch-count", "images", "num", "number", "repeat"),
    "--seed": ("generator", "random-seed", "manual-seed", "rng-seed", "noise-seed", "seeds"),
    "--out": ("output", "output-dir", "outdir", "out-dir", "output-path", "output-file", "outfile", "save", "save-to",
              "save-path", "dest", "destination", "filename", "format", "image-format", "output-format"),
    "--size": ("resolution", "res", "dimensions", "image-size", "img-size"),
    "--width": ("w", "image-width"), "--height": ("h", "image-height"),
    "--negative-prompt": ("negative", "neg", "neg-prompt", "n-prompt", "negative-text"),
    "--prompt": ("text", "caption", "prompt-text"),
    "--prompt-file": ("prompts", "prompts-file", "from-file", "file", "input-file", "captions", "prompt-path"),
    "--like": ("from-image", "reproduce", "like-image"),
    "--dtype": ("torch-dtype", "precision", "weight-dtype", "data-type"),
    "--dtype bf16": ("bf16", "bfloat16"), "--dtype fp16": ("fp16", "half", "float16"),
    "--dtype fp32": ("fp32", "full-precision", "float32"),
    "--model": ("checkpoint", "ckpt", "model-id", "model-path", "model-name", "repo", "repo-id", "pretrained",
                "pretrained-model-name-or-path", "pretrained-model", "base-model"),
    "--lora": ("loras", "lora-path", "lora-file", "lora-weights", "lora-paths", "adapter"),
    "--lora FILE=0.8": ("lora-scale", "lora-weight", "lora-strength", "adapter-weights"),
    "--scheduler": ("sampler", "sampler-name", "sampling-method", "solver", "noise-scheduler"),
    "--gpus": ("gpu", "gpu-id", "gpu-ids", "cuda", "cards", "cuda-devices", "cuda-visible-devices"),
    "--gpus 0,1": ("num-gpus", "n-gpus", "gpu-count"),
    "--device": ("devices",),
    "--place": ("device-map", "placement"),
    "--place denoise=tensor_parallel": ("tensor-parallel", "tensor-parallel-size", "tp", "tp-size"),
    "--max-memory": ("vram", "max-vram", "gpu-memory", "max-gpu-memory", "memory", "vram-limit"),
    "--allow-offload cpu": ("offload", "cpu-offload", "model-cpu-offload", "enable-model-cpu-offload", "lowvram",
                            "enable-sequential-cpu-offload", "sequential-cpu-offload", "low-vram", "medvram"),
    "--tile": ("vae-tiling", "enable-vae-tiling", "tiling", "tiled-vae", "tile-size"),
    "--ranks": ("nproc", "nproc-per-node", "num-processes", "processes", "world-size", "workers", "num-workers"),
    "--artifacts": ("store", "artifact-store", "storage"),
    "--overwrite": ("force", "replace", "clobber"),
    "--verbose": ("debug",), "--quiet": ("silent",),
    "--from-stage": ("start-from", "start-stage"), "--stop-after": ("until", "stop-stage", "only"),
}
_INSTEAD: Mapping[str, str] = {name: option for option, names in _OPTIONS.items() for name in names}
# What no option says.
_OTHERWISE: Mapping[str, str] = {
    **dict.fromkeys(("cache-dir", "hf-home"), "the variable HF_HOME says where models are kept"),
    **dict.fromkeys(("token", "hf-token"), "`hf auth login` once, or the variable HF_TOKEN"),
    **dict.fromkeys(("local-files-only", "offline"), "the variable HF_HUB_OFFLINE=1"),
    **dict.fromkeys(("config", "config-file", "settings"), "the variable STAGERUN_CONFIG names the file of settings"),
    **dict.fromkeys(("load-in-4bit", "load-in-8bit", "quantize", "quantization"),
                    "leave it out: nothing is quantized; --max-memory and --allow-offload make it fit"),
    **dict.fromkeys(("dry-run", "plan", "check"), "the command plan, which loads nothing"),
    "resume": "the command resume: python -m runner resume last",
}
# By the words of a command here, what others call it.
_COMMANDS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("runs", "ls"): ("ls", "list", "history", "status", "ps", "log", "logs"), ("runs", "show"): ("show",),
    ("runs", "rm"): ("rm", "remove", "delete"), ("runs", "gc"): ("gc",), ("runs", "du"): ("du", "usage", "cache"),
    ("runs", "prune"): ("prune", "clean", "clear", "cleanup", "purge"), ("runs", "verify"): ("verify", "fsck"),
    ("--version",): ("version",), ("models",): ("families", "model", "list-models"),
    ("flux", "--print-config"): ("config", "settings", "configure"), ("resume", "last"): ("continue", "retry"),
    ("doctor",): ("env", "info", "check", "gpus", "cards", "devices", "diagnose", "test"),
    ("flux",): ("run", "generate", "gen", "draw", "create", "make", "image", "imagine", "txt2img", "t2i", "render",
                "infer", "sample"),
    ("plan", "flux"): ("fit", "fits", "estimate", "dry-run"),
}
_MEANT: Mapping[str, tuple[str, ...]] = {name: meant for meant, names in _COMMANDS.items() for name in names}
_OF_RUNS: Mapping[str, str] = {
    "list": "ls", "delete": "rm", "remove": "rm", "del": "rm", "forget": "rm", "clean": "prune", "clear": "prune",
    "size": "du", "usage": "du", "info": "show", "describe": "show", "get": "show", "check": "verify",
    "fsck": "verify", "resume": "show",
}


def plain(option: str) -> str:
    """An option's name without its dashes in front, in small letters, its parts apart by dashes."""
    return option.lstrip("-").lower().replace("_", "-")


def option_for(option: str, known: Collection[str]) -> str | None:
    """The option among the `known` ones that is meant by another spelling, with what goes with it; None for none."""
    name = plain(option)
    if f"--{name}" in known:
        return f"--{name}"
    meant = _INSTEAD.get(name)
    return meant if meant is not None and meant.partition(" ")[0] in known else None


def otherwise(option: str) -> str | None:
    """What to do in place of an option that is none here; None where nobody knows."""
    return _OTHERWISE.get(plain(option))


def command_for(word: str, rest: Collection[str]) -> str | None:
    """The command line that is meant by a first word with what follows it; None where it is no habit."""
    name = word.lower()
    if name == "help":
        return line(*rest, "--help")
    meant = _MEANT.get(name)
    return None if meant is None else line(*meant, *rest)


def of_runs(word: str) -> str | None:
    """The command of `runs` that a word means; None where it is no habit."""
    return _OF_RUNS.get(word.lower())
