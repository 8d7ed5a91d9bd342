"""The egress guard: values that a user protects are looked for in what is sent to any other.

What it cannot see: answers with a content-encoding, files that the server sends by itself, what is encoded in other
ways than with the escapes of JSON and of URLs (base64, UTF-16, encryption), values glued to other letters, cut in two
or changed, and what leaves by ways that are not the package's. Values that were forgotten are protected no more.

In reporting mode no answer differs for a hit. Where hits are held back, a hit shows as an error: whoever already has a
value, and gets it sent to another account than the one that gave it away, or changes it in a way that the application
undoes, learns that it is live. What has 64 bits of entropy nobody finds by guessing.
"""

from ucm_middleware.egress.logs import EgressFilter
from ucm_middleware.egress.policy import EgressPolicy
from ucm_middleware.egress.spans import EgressSpanProcessor

__all__ = ["EgressFilter", "EgressPolicy", "EgressSpanProcessor"]
