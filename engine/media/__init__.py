"""Images and video, from where a client says they are to what a model's processor makes of their pixels.

    Image, Video parts ── sources ──> bytes ── pool of processes: decoding, the processor ──> Prepared, kept by content
                         (data:, http(s):, file:)                                                (store)

Pillow and PyAV, which decode, are loaded in processes that can be killed, and in no other. Left out: what a processor
does (engine/conversation/media.py has its face), and what the device makes of it.
"""
