"""Two questions about a picture, whose tokens are computed once. The default model reads text; name one that sees:

    python examples/language/picture.py http://127.0.0.1:8000 photo.jpg

The first argument is a server of a vision model. Without a picture it shows a red square of its own making.
"""

import base64
import sys

from engine.lang import Server, State, assistant, function, gen, image, user

RED_SQUARE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR42mP4z8CAFTEMLQkAKP8/wc53yE8AAAAASUVORK5CYII="
)


@function
def look(s: State, picture: str | bytes) -> None:
    s += user(image(picture) + "What is this?")
    s += assistant(gen("what", max_tokens=40))
    s += user("Which colour is it?")
    s += assistant(gen("colour", max_tokens=10))


def main(url: str, picture: str | bytes = RED_SQUARE) -> None:
    with Server(url) as server:
        s = look.run(picture, backend=server, temperature=0)
        if (error := s.error()) is not None:
            print(f"This server does not see: {error}")
            return
        print(f"{'prompt':>8}{'cached':>8}  answer")
        for name in ("what", "colour"):
            meta = s.get_meta_info(name)
            print(f"{meta.prompt_tokens:8}{meta.cached_tokens:8}  {s[name].strip()}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["http://127.0.0.1:8000"])
