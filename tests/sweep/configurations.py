"""The settings of all families that differ from the rules."""

from .settings import Settings
from .settings_multimodal import MULTIMODAL
from .settings_speech import SPEECH
from .settings_text import TEXT
from .settings_vision import VISION

SETTINGS: dict[str, Settings] = TEXT | VISION | SPEECH | MULTIMODAL
