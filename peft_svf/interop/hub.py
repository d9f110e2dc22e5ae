"""An expert on the Hub, with a card that loads it by copy and paste."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

from ..reporting.cards import complete_card
from ..tuner.config import SVFConfig

# checkpoints of a trainer, and what it logged
LEFT_OUT = ["checkpoint-*/**", ".*", "*.bin", "*.pt", "*.pth", "completions/**", "runs/**"]

_ADAPTER = r'(PeftModel\.from_pretrained\(base_model, )"[^"]*"'


def push_expert(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload SVF expert",
) -> str:
    """
    Upload the folder of a saved expert: adapter, card, plots and numbers.

    `PeftModel.push_to_hub` uploads adapter and config only, and puts an empty card in the place of the folder's own.

    Args:
        folder: What `save_pretrained`, the training script or a mixture wrote.
        repo_id (`str`): Where to, such as `"me/my-expert"`. It is made if it is not there.
        revision (`str`, *optional*): The branch, made if it is not there.
        private (`bool`, *optional*): Whether a new repository is private.
        token (`str`, *optional*): By default that of `hf auth login`.
        commit_message (`str`): Of the commit.

    Returns:
        `str`: The address of the commit.

    Raises:
        ValueError: There is no SVF adapter in the folder.
    """
    source = Path(folder)
    config = SVFConfig.from_pretrained(str(source))
    if not isinstance(config, SVFConfig):
        raise ValueError(f"{source} is a {config.peft_type} adapter, not an SVF one.")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary, "expert")
        shutil.copytree(source, staged)
        readme = staged / "README.md"
        if readme.exists():  # it names the folder that it was saved in
            text = re.sub(_ADAPTER, rf'\1"{repo_id}"', readme.read_text(encoding="utf-8"))
            readme.write_text(text, encoding="utf-8")
        else:
            readme.write_text(f"# {repo_id.split('/')[-1]}\n\nAn SVF expert (Transformer²).\n", encoding="utf-8")
        card = ModelCard.load(readme, ignore_metadata_errors=True)
        if Path(str(card.data.base_model or "")).exists():
            card.data.base_model = None  # a folder here says nothing to others
            card.save(readme)
        complete_card(readme, config.base_model_name_or_path, repo_id, config.revision)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=staged,
            revision=revision,
            commit_message=commit_message,
            ignore_patterns=LEFT_OUT,
        )
    return str(commit.commit_url)
