"""Nodes that open models and say what is loaded."""

import logging

from comfy_api.latest import io

from storymem_dist.errors import StoryMemError
from storymem_dist.pipeline import StoryMemory, check_models, open_models

from .host import Models, device_of, model_choices, models_arguments

STORYMEM_MODELS = io.Custom("STORYMEM_MODELS")
STORYMEM_MEMORY = io.Custom("STORYMEM_MEMORY")

CONTINUATIONS = ["MI2V", "MM2V"]
LINEARS = ["exact", "float8", "int8"]

logger = logging.getLogger(__name__)


class ModelLoader(io.ComfyNode):
    """Opens base models and LoRAs; weights are read when the first shot needs them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryMemModelLoader",
            display_name="StoryMem Model Loader",
            category="StoryMem/loaders",
            description="Opens the base models and the StoryMem LoRA. Weights are read when the first shot needs them.",
            inputs=[
                io.Combo.Input(
                    "t2v_model",
                    options=model_choices("t2v"),
                    tooltip="Folder under models/storymem with Wan2.2-T2V-A14B: it renders first shots. nano (a small "
                    "trained model) and tiny (random weights) come with the package and bring all models themselves.",
                ),
                io.Combo.Input(
                    "i2v_model",
                    options=model_choices("i2v"),
                    tooltip="Folder under models/storymem with Wan2.2-I2V-A14B: it renders all shots with memory. Not "
                    "used with nano and tiny.",
                ),
                io.Combo.Input(
                    "m2v_lora",
                    options=CONTINUATIONS,
                    default="MI2V",
                    tooltip="StoryMem's LoRA for shots that continue another: MI2V from its last frame, MM2V from its "
                    "last five. Cuts (M2V) work with both.",
                ),
                io.Combo.Input(
                    "device",
                    options=["auto", "cuda", "cpu"],
                    default="auto",
                    tooltip="auto: the device that ComfyUI itself uses.",
                ),
                io.Boolean.Input(
                    "enable_offload",
                    default=True,
                    tooltip="On: weights wait in host memory where the device has no room for all of them. Off: all "
                    "weights stay on the device.",
                ),
                io.Boolean.Input(
                    "use_fsdp",
                    optional=True,
                    default=False,
                    tooltip="Render Story with several GPUs: all GPUs render one shot together, with the weights split "
                    "over them. Off: each GPU renders shots of its own. Nothing else uses it.",
                ),
                io.Combo.Input(
                    "linears",
                    options=LINEARS,
                    optional=True,
                    default=LINEARS[0],
                    tooltip="float8 and int8 halve the memory of the weights and are faster; pictures differ a little.",
                ),
            ],
            outputs=[STORYMEM_MODELS.Output("models_out", display_name="models", tooltip="For the shots of a story.")],
        )

    @classmethod
    def validate_inputs(
        cls, t2v_model: str | None, i2v_model: str | None, m2v_lora: str | None, device: str | None
    ) -> bool | str:
        if device not in (None, "auto", "cuda", "cpu"):
            return f"device={device} is not allowed; choose auto, cuda or cpu"
        if m2v_lora is not None and m2v_lora not in CONTINUATIONS:
            return f"m2v_lora={m2v_lora} is not allowed; choose {' or '.join(CONTINUATIONS)}"
        try:
            if device is not None:
                device_of(device)
            if t2v_model is not None and i2v_model is not None:
                continuation = (m2v_lora or CONTINUATIONS[0]).lower()
                check_models(**models_arguments(t2v_model, i2v_model), continuation=continuation)
        except StoryMemError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        t2v_model: str,
        i2v_model: str,
        m2v_lora: str,
        device: str,
        enable_offload: bool,
        use_fsdp: bool = False,
        linears: str = LINEARS[0],
    ) -> io.NodeOutput:
        models = open_models(
            **models_arguments(t2v_model, i2v_model),
            continuation=m2v_lora.lower(),
            device=device_of(device),
            offload=enable_offload,
            overrides=() if linears == LINEARS[0] else (f"model.linears={linears}",),
        )
        return io.NodeOutput(Models(models, fsdp=use_fsdp))


class Info(io.ComfyNode):
    """Says in words what models and a memory are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StoryMemInfo",
            display_name="StoryMem Info",
            category="StoryMem/utils",
            description="Writes what the models and the memory are into ComfyUI's log and into the results.",
            is_output_node=True,
            inputs=[
                STORYMEM_MODELS.Input("models", optional=True, tooltip="Models to describe."),
                STORYMEM_MEMORY.Input("memory", optional=True, tooltip="Memory to describe."),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, models: Models | None = None, memory: StoryMemory | None = None) -> io.NodeOutput:
        described = [value.describe() for value in (models and models.models, memory) if value is not None]
        text = "\n".join(f"{name}: {value}" for facts in described for name, value in facts.items())
        text = text or "nothing is connected"
        logger.info("StoryMem Info\n%s", text)
        return io.NodeOutput(ui={"text": (text,)})
