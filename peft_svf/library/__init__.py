"""A folder of experts for one base model, with what dispatch needs to know about them."""

from .format import FILE, LibraryDispatch, LibraryExpert
from .library import ExpertLibrary
from .sources import Source

__all__ = ["FILE", "ExpertLibrary", "LibraryDispatch", "LibraryExpert", "Source"]
