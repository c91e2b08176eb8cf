"""The README of a folder in timm's format, and its upload to the Hugging Face hub."""

import json
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import HFValidationError, validate_repo_id

from deploy.model import ModelCard
from utils import UserError, first_line

MOST_NAMED = 200  # classes in the README; config.json names all of them


def readme(card: ModelCard, accuracy: float | None) -> str:
    """A model card: what the network is, and how it is used.

    Args:
        accuracy: in %, as the checkpoint records it.
    """
    data = huggingface_hub.ModelCardData(
        library_name="timm", pipeline_tag="image-classification", metrics=["accuracy"]
    )
    scored = "not recorded in the checkpoint"
    if accuracy is not None:
        scored = f"{accuracy:.2f} % on the validation images of its training"
    names = json.dumps(card.classes[:MOST_NAMED], ensure_ascii=False)  # one line, also for a fence
    rest = "" if len(card.classes) <= MOST_NAMED else f" (the first {MOST_NAMED})"
    text = f"""---
{data.to_yaml()}
---
# {card.architecture} for {len(card.classes)} classes

An image classifier: timm's `{card.architecture}` with {card.dtype} weights, trained by `main.py`
and exported by `export.py` of a trainer for knowledge distillation.

- **Accuracy:** {scored}
- **Input:** an image {card.preprocessing}; normalized with mean {card.mean} and standard deviation
  {card.std}
- **Output:** logits, in the order of the classes; the softmax gives probabilities

Classes{rest}:

```json
{names}
```

## With timm

FOLDER is this folder; from the hub, write `hf-hub:OWNER/NAME` for `local-dir:FOLDER`.

```python
import timm
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open("photo.jpg").convert("RGB"))
probabilities = model(image[None]).softmax(dim=-1)[0]
names = model.pretrained_cfg["label_names"]
```

## With the project that trained it

```bash
python predict.py FOLDER photo.jpg
```
"""
    return str(huggingface_hub.ModelCard(text))


def check_upload(name: str) -> None:
    """Raise UserError for a name that the hub would refuse, or if there is no token."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {name}: {first_line(error)}; pass OWNER/NAME") from error
    if not huggingface_hub.get_token():
        raise UserError(
            f"--push_to_hub {name}: the hub needs a token; run hf auth login, or set HF_TOKEN"
        )


def upload(folder: Path, name: str) -> str:
    """Upload a folder as it was compared; a README that the hub has already stays.

    timm.models.push_to_hf_hub would write the files again, with a config.json that transformers
    cannot load (see writers.write_timm) and a license of its own.

    Returns: the name on the hub. Raises: UserError if that fails.
    """
    api = huggingface_hub.HfApi(library_name="timm")
    try:
        name = api.create_repo(name, exist_ok=True).repo_id
        ignored = ["README.md"] if api.file_exists(name, "README.md") else None
        api.upload_folder(
            repo_id=name, folder_path=folder, ignore_patterns=ignored, commit_message="Add model"
        )
    except Exception as error:  # of the network, the hub, or its rules
        raise UserError(
            f"--push_to_hub {name}: {folder} is complete, but was not uploaded "
            f"({first_line(error)}); check network and token, then run hf upload {name} {folder} ."
        ) from error
    return name
