"""What pipelines of diffusers have and need not have here: each says what does it."""

from typing import Any, NoReturn

from stages.errors import InvalidInput
from stages.wording import kind_of


class NotHere(InvalidInput, AttributeError):
    """An attribute that diffusers has, or that somebody may look for; `hasattr` says that it is not there."""


class Instead:
    """An attribute that there is not: to read, call or set it is a NotHere with what to write instead."""

    def __init__(self, text: str) -> None:
        self._text, self.__doc__ = text, f"Not here -> {text}."

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __repr__(self) -> str:
        return f"<not here: {self._text}>"

    def __get__(self, instance: object, owner: type | None = None) -> "Instead":
        if instance is None:
            return self
        self._refuse(type(instance))

    def __set__(self, instance: object, value: object) -> NoReturn:
        self._refuse(type(instance))

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """What a call on the class comes to."""
        self._refuse(self._owner)

    def _refuse(self, owner: type) -> NoReturn:
        error = NotHere(f"a {owner.__name__.lower()} has no {self._name} -> {self._text}")
        # Otherwise Python adds a guess of its own.
        error.name = self._name
        raise error


_PLACES = "devices=, place= or max_memory= of the pipeline, and print(pipe.plan) says where all of it goes"
_MOVED = "leave it out: the plan places each stage; devices= of the pipeline says where it may, dtype= in which type"
_OFFLOAD = 'allow_offload="cpu" of the pipeline lets blocks that fit no card wait in host memory'
_TILES = "leave it out: pictures that do not fit whole are decoded in tiles; tile=512 of the pipeline says how large"
_ATTENTION = "leave it out: attention is never held whole"
_WHOLE = "leave it out: nothing is fused, compiled or cut; every picture is that of the model as it is"
_LORAS = 'loras=["style.safetensors=0.8"] of the pipeline, each with its scale'
_LOADED = "a stage loads it and lets go of it again: in a call no model is there to be reached"
_ENCODE = "pipe.encode(...) gives the embeddings of a prompt, and pipe.denoise takes them, changed or not"
_SCHEDULER = 'scheduler= of the pipeline, such as scheduler="UniPCMultistepScheduler", with the config of the model\'s'
_ANEW = "make another: Pipeline(...) loads nothing, and takes no time"
_TEXT_ALONE = "leave it out: pictures are made of text alone"
_STEP = "on_step= of the call, which hears of every step, and ends the run where it gives False"


class Habits:
    """What users of diffusers may reach for first, done where that is plain, or refused in a line."""

    _progress: bool | None

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and not isinstance(getattr(type(self), name, None), Instead):
            raise NotHere(f"a pipeline stays as it is, and {name} cannot be set -> what Pipeline(...) and a call take "
                          f"is in help(stagerun.Pipeline)")
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if not isinstance(getattr(type(self), name, None), Instead)]

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: every stage loads its components alone, and gives back their memory behind it."""

    def enable_vae_slicing(self) -> None:
        """Nothing to do: pictures are decoded one by one."""

    def set_progress_bar_config(self, *, disable: bool | None = None, **kwargs: Any) -> None:
        """Show how calls go on, or with `disable` do not; of what else tqdm takes there is no use here."""
        if not isinstance(disable, bool | None):
            raise InvalidInput(f"disable is {kind_of(disable)} -> True or False")
        self._progress = None if disable is None else not disable

    to = Instead(_MOVED)
    cuda = Instead(_MOVED)
    cpu = Instead(_MOVED)
    half = Instead('dtype="float16" of the pipeline')
    float = Instead('dtype="float32" of the pipeline')
    device = Instead(_PLACES)
    hf_device_map = Instead("pipe.plan.device_map")
    reset_device_map = Instead(_ANEW)
    dtype = Instead("dtype= of the pipeline, and print(pipe.plan) says the type of each component")

    enable_sequential_cpu_offload = Instead(_OFFLOAD)
    enable_group_offload = Instead(_OFFLOAD)
    maybe_free_model_hooks = Instead("leave it out: nothing stays loaded behind a call")
    remove_all_hooks = Instead("leave it out: nothing stays loaded behind a call")
    enable_vae_tiling = Instead(_TILES)
    disable_vae_tiling = Instead("tile=0 of the pipeline decodes whole pictures")
    disable_vae_slicing = Instead("leave it out: pictures are decoded one by one")
    upcast_vae = Instead('dtype={"vae": "float32"} of the pipeline')
    enable_attention_slicing = Instead(_ATTENTION)
    disable_attention_slicing = Instead(_ATTENTION)
    set_attention_slice = Instead(_ATTENTION)
    enable_xformers_memory_efficient_attention = Instead(_ATTENTION)
    disable_xformers_memory_efficient_attention = Instead(_ATTENTION)
    set_use_memory_efficient_attention_xformers = Instead(_ATTENTION)
    enable_freeu = Instead(_WHOLE)
    disable_freeu = Instead(_WHOLE)
    fuse_qkv_projections = Instead(_WHOLE)
    unfuse_qkv_projections = Instead(_WHOLE)
    compile_repeated_blocks = Instead(_WHOLE)
    enable_cache = Instead(_WHOLE)

    load_lora_weights = Instead(_LORAS)
    unload_lora_weights = Instead("a pipeline without loras=")
    set_adapters = Instead(_LORAS)
    get_active_adapters = Instead("pipe.plan.checkpoint.loras")
    get_list_adapters = Instead("pipe.plan.checkpoint.loras")
    delete_adapters = Instead("a pipeline without loras=")
    fuse_lora = Instead("leave it out: LoRAs are merged into each weight as it is read")
    unfuse_lora = Instead("a pipeline without loras=")
    enable_lora = Instead(_LORAS)
    enable_lora_hotswap = Instead(_LORAS)
    lora_scale = Instead(_LORAS)
    save_lora_weights = Instead("leave it out: a LoRA's file stays as it is, and can be copied")
    disable_lora = Instead("a pipeline without loras=")
    set_lora_device = Instead("leave it out: LoRAs are merged into each weight as it is read")
    load_textual_inversion = Instead("loras= of the pipeline, or change the embeddings between pipe.encode and "
                                     "pipe.denoise: no textual inversions are read")
    load_ip_adapter = Instead(_TEXT_ALONE)
    set_ip_adapter_scale = Instead(_TEXT_ALONE)
    unload_textual_inversion = Instead("leave it out: no textual inversions are read")
    unload_ip_adapter = Instead(_TEXT_ALONE)

    scheduler = Instead(_SCHEDULER)
    transformer = Instead(_LOADED)
    unet = Instead(_LOADED)
    vae = Instead(f"{_LOADED}; pipe.decode decodes latents")
    text_encoder = Instead(f"{_LOADED}; {_ENCODE}")
    text_encoder_2 = Instead(f"{_LOADED}; {_ENCODE}")
    text_encoder_3 = Instead(f"{_LOADED}; {_ENCODE}")
    tokenizer = Instead(_LOADED)
    tokenizer_2 = Instead(_LOADED)
    tokenizer_3 = Instead(_LOADED)
    image_processor = Instead("result.images are PIL's already")
    safety_checker = Instead("leave it out: no picture is checked or blacked")
    components = Instead("pipe.plan.checkpoint.components, by name and without weights")
    config = Instead("pipe.plan.checkpoint and pipe.family")
    vae_scale_factor = Instead("pipe.plan.stages[1].scale_factor")

    encode_prompt = Instead(_ENCODE)
    encode_image = Instead(_TEXT_ALONE)
    prepare_latents = Instead("seed= or generator= of the call says the noise")
    check_inputs = Instead("pipe.job_for(...) checks what a call takes, and pipe.plan_for(...) plans it")
    progress_bar = Instead("progress= of the pipeline, or on_step= of the call")
    guidance_scale = Instead("guidance_scale= of the call")
    num_timesteps = Instead("num_inference_steps= of the call")
    attention_kwargs = Instead(_LORAS)
    joint_attention_kwargs = Instead(_LORAS)
    current_timestep = Instead(_STEP)
    interrupt = Instead(_STEP)
    num_inference_steps = Instead("num_inference_steps= of the call")
    steps = Instead("num_inference_steps= of the call")
    seed = Instead("seed= of the call")
    height = Instead("height= of the call")
    width = Instead("width= of the call")
    images = Instead('pipe("a red circle").images')
    generate = Instead('pipe("a red circle")')
    run = Instead('pipe("a red circle")')
    model = Instead("pipe.plan.checkpoint.source")
    register_modules = Instead(_ANEW)
    from_pipe = Instead(_ANEW)
    from_single_file = Instead("a folder in diffusers' layout, of save_pretrained")
    from_config = Instead(_ANEW)
    download = Instead("Pipeline(...) and a call, which downloads what is not here once all of it has a place")
    name_or_path = Instead("pipe.plan.checkpoint.source")
    parameters = Instead("pipe.plan.weights")
    numpy_to_pil = Instead("result.images are PIL's already")
    save_pretrained = Instead("leave it out: the model's folder stays as it is, and can be copied")
    push_to_hub = Instead("leave it out: the model's folder stays as it is, and can be copied")


class ResultHabits:
    """What users of diffusers, and others, may look for in a result."""

    image = Instead("result.images[0], or for image in result")
    pictures = Instead("result.images, or result.report.pictures, which save themselves")
    seed = Instead("result.seeds[0]")
    save = Instead('result.images[0].save("fox.png")')
    show = Instead("result.images[0]")
    latents = Instead("pipe.denoise(pipe.encode(...)), which gives them")
    frames = Instead("result.images: no video is made")
    nsfw_content_detected = Instead("leave it out: no picture is checked or blacked")
