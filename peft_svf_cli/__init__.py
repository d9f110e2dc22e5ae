"""The command line `peft-svf`.

A package of its own, for whoever asks for help must not wait for torch: `import peft_svf` registers SVF with PEFT, and
so loads all of it. Here, that happens where a command begins its work.
"""
