"""transformers' list of its own models, made once: it reads all of its files for it, and later all of them again."""

from importlib import import_module
from pathlib import Path
from typing import Any

from transformers.utils import import_utils


def import_models() -> None:
    """Import `transformers.models` with the list that `transformers` made when it was imported, instead of another.

    Without effect where that is imported already, or where transformers makes its list in another way.
    """
    scan: Any = getattr(import_utils, "create_import_structure_from_path", None)
    if scan is None:
        return

    def listed(path: Any) -> Any:
        # Lists are kept by path: that of the folder, and then that of the file in it, which stands for the same.
        return scan(Path(path).parent if Path(path).name == "__init__.py" else path)

    import_utils.create_import_structure_from_path = listed
    try:
        import_module("transformers.models")
    finally:
        import_utils.create_import_structure_from_path = scan
