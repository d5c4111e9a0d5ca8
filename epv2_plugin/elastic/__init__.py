"""Framework-neutral expert-parallel communication: `ElasticBuffer` and what goes with it."""

from epv2_plugin.elastic.buffer import ElasticBuffer
from epv2_plugin.elastic.errors import BufferSizeError, CommunicationError, CommunicationTimeout
from epv2_plugin.elastic.event import EventOverlap
from epv2_plugin.elastic.handle import EPHandle

__all__ = ["BufferSizeError", "CommunicationError", "CommunicationTimeout", "EPHandle", "ElasticBuffer", "EventOverlap"]
