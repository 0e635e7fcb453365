"""The one door to tqdm: progress bars as widgets in notebooks that can show them, as text elsewhere."""

import warnings

with warnings.catch_warnings():
    # without ipywidgets a notebook has the bar as text, which nobody has to be warned of
    warnings.filterwarnings("ignore", "IProgress not found")
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
