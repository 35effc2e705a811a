"""Shapes that real networks normalize, by name; small enough for a test by their batch."""

ROWS = {
    "gpt2": (4, 16, 768),
    "bert-large": (2, 16, 1024),
    "llama-7b": (2, 4, 4096),
    "vit-so400m": (3, 7, 1152),
    "mlp": (32, 100),
    "single": (5, 1),
}

IMAGES = {
    "resnet-stem": (2, 28, 28, 64),
    "resnet-stage3": (8, 7, 7, 256),
    "diffusion-unet": (2, 8, 8, 320),
    "digits": (16, 8, 8, 32),
}
