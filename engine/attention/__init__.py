"""Attention over pages: one backend a file behind one interface (`base.py`), plugged into Hugging Face models by `hf.py`."""
