"""A tier as a third party would write it, in one file: pages in a dictionary, which is odd in the way that the argument
says. `--plugins tests/lib/odd_store.py --kv-disk odd:1MiB`."""

from engine.plugin import hookimpl
from engine.plugin.tiers import Held

API = 1


@hookimpl
def register_tiers(register):
    register("odd", "odd_store:OddStore", kind="store", description="pages in a dictionary")


class OddStore:
    """ "odd" forgets each page with an odd first byte of its key, and "broken" raises. "short" answers for a page less
    than it is asked for, "vague" with numbers in the place of truth, and "lost" cannot say what it holds."""

    def __init__(self, *, capacity_bytes, page_bytes, manifest, argument):
        self.bound, self.argument, self.manifest = capacity_bytes, argument, manifest
        self.pages, self.written = {}, 0

    def put(self, keys, pages, /):
        if self.argument == "broken":
            raise OSError("the disk is on fire")
        for key, page in zip(keys, pages, strict=True):
            if self.argument != "odd" or not key[0] % 2:
                self.pages[key] = bytes(page)
                self.written += 1
        return [key in self.pages for key in keys]

    def get(self, keys, into, /):
        for key, place in zip(keys, into, strict=True):
            place[:] = self.pages.get(key, b"\xee" * len(place))
        return self.has(keys)

    def has(self, keys, /):
        answers = [key in self.pages for key in keys]
        match self.argument:
            case "short":
                return answers[1:]
            case "vague":
                return [300 if each else None for each in answers]
            case _:
                return answers

    def drop(self, keys, /):
        for key in keys:
            self.pages.pop(key, None)

    def held(self):
        if self.argument == "lost":
            raise OSError("the index is gone")
        counts = {"pages_written": self.written}
        return Held(len(self.pages), sum(map(len, self.pages.values())), self.bound, counts)

    def clear(self):
        self.pages.clear()

    def close(self):
        self.clear()
