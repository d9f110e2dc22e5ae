"""Upload an expert to the Hub, with a model card that loads it by copy and paste."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from ..reporting.cards import publish_card
from ..tuner.checkpoint import Checkpoint, adapter_tensors
from ..tuner.config import load_svf_config

# trainer checkpoints and logs
LEFT_OUT = ["checkpoint-*/**", ".*", "*.bin", "*.pt", "*.pth", "completions/**", "runs/**"]


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
    Upload the folder of a saved expert: adapter, model card, plots and records.

    `PeftModel.push_to_hub` uploads only adapter and config, and replaces the folder's card by an empty one.

    Args:
        folder: The output of `save_pretrained`, of the training command or of a mixture.
        repo_id (`str`): The repository, such as `"me/my-expert"`. It is created if necessary.
        revision (`str`, *optional*): The branch, created if necessary.
        private (`bool`, *optional*): Whether a new repository is private.
        token (`str`, *optional*): By default that of `hf auth login`.
        commit_message (`str`): Message of the commit.

    Returns:
        `str`: The URL of the commit.

    Raises:
        ValueError: There is no SVF adapter in the folder, or it is incomplete or damaged.
    """
    config = load_svf_config(folder)
    if config.checkpoint is None:
        raise ValueError(f"{folder} holds the config of an adapter, but not its file. Save the adapter again.")
    config.check_checkpoint(folder, Checkpoint.of_tensors(adapter_tensors(folder)))
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        staged = shutil.copytree(folder, Path(temporary, "expert"))
        publish_card(staged / "README.md", config.base_model_name_or_path, repo_id, config.revision)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=staged,
            revision=revision,
            commit_message=commit_message,
            ignore_patterns=LEFT_OUT,
        )
    return str(commit.commit_url)
