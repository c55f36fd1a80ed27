"""Data: from a file or the hub to records, from records to encoded examples, from examples to batches."""

from .batching import Order, in_order
from .encoding import IGNORED, Example, encode_segments, padding_id, pieces, prompt_ids
from .rendering import Completion, PlainText, Rendering, Segment, Text, rendering_of
from .source import columns_of, hold_out, open_source

__all__ = [
    "IGNORED",
    "Completion",
    "Example",
    "Order",
    "PlainText",
    "Rendering",
    "Segment",
    "Text",
    "columns_of",
    "encode_segments",
    "hold_out",
    "in_order",
    "open_source",
    "padding_id",
    "pieces",
    "prompt_ids",
    "rendering_of",
]
