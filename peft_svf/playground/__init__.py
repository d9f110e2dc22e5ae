"""A page in the browser to try experts: chat, mixtures, dispatch, search, and δ. `peft-svf playground` serves it."""
