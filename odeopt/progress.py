"""The one door to tqdm: progress bars as widgets in notebooks that can show them, as text elsewhere."""

import warnings

with warnings.catch_warnings():
    # without ipywidgets a notebook has the bar as text, which nobody has to be warned of
    warnings.filterwarnings("ignore", "IProgress not found")
    from tqdm.auto import tqdm as _tqdm

__all__ = ["tqdm"]


class tqdm(_tqdm):  # noqa: N801, the name that everybody knows
    """A progress bar, of which Ctrl-C in the midst of its beginning leaves no error behind."""

    def __del__(self) -> None:
        if hasattr(self, "start_t"):  # the last attribute that tqdm's `__init__` sets
            super().__del__()
