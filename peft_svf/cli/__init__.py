"""The command line `peft-svf`. Each command imports what it needs when it begins its work, so that help is fast."""
