"""PEFT's test helpers import one name from diffusers, for an `isinstance` check; diffusers itself is not needed."""


class StableDiffusionPipeline:
    """Nothing is an instance of it."""
