"""Names with one meaning in results, dispatch and on the command line."""

BASE = "base"  # the base model without an expert
CLASSIFIER = "svf-classifier"  # the adapter that classifies prompts
