"""Chat in a terminal: the turns, reading a line, and printing a text while it is generated, token by token."""

import codecs
import io
import sys

import torch

from support.errors import ConfigError, TokenizerError


def chat(tokenizer, context, reply):
    """Turn by turn until an empty line; reply(ids) -> text. When the context is full, the oldest exchange goes."""
    print("Chat. An empty line ends it, /new starts over.")
    history = []
    while True:
        try:
            text = read_line()
        except KeyboardInterrupt:
            text = ""
        except ConfigError as error:
            print(f"({error})")
            continue
        if not text:
            return
        if text == "/new":
            history = []
            continue
        history.append({"role": "user", "content": text})
        try:
            ids, _ = tokenizer.encode_chat(history, True)
            while len(history) > 1 and len(ids) + 16 > context:
                del history[:2]
                print("(the context is full: the oldest exchange was forgotten)")
                ids, _ = tokenizer.encode_chat(history, True)
            history.append({"role": "assistant", "content": without_thoughts(reply(ids))})
        except (KeyboardInterrupt, ConfigError, TokenizerError) as error:  # such a message does not count
            print("(stopped)" if isinstance(error, KeyboardInterrupt) else f"({error})")
            history.pop()


def without_thoughts(text):
    """A turn as later turns read it: Qwen3's template leaves out what stands before </think>."""
    return text.rpartition("</think>")[2].lstrip("\n") if "</think>" in text else text


def read_line():
    """The next line of stdin, from a terminal or a pipe, without the white space around it; "" at its end, or if there
    is no stdin. ConfigError if its bytes are no text in the encoding of the locale; the next line can be read then."""
    try:
        if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors == "strict":
            sys.stdin.reconfigure(errors="surrogateescape")  # strict would lose the lines that were read ahead
        line = input("> ").strip()
    except UnicodeError:  # of an encoding that has no surrogateescape
        raise ConfigError("the line is no text in the encoding of this terminal; type it again") from None
    except (EOFError, OSError, ValueError, RuntimeError):  # at the end; the terminal is gone; stdin is closed; is None
        return ""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = f"a byte that is no text here (read as the surrogate {line[error.start]!r})"
        raise ConfigError(f"the line holds {byte}; type it again") from None
    return line


class StreamedText:
    """Prints tokens as they are generated. An incomplete character (one can span several tokens) is held back, and so
    is text that may be the beginning of a stop text, because stop texts are never printed."""

    def __init__(self, tokenizer, stop_texts=(), stop_ids=()):
        self.tokenizer, self.stop_texts, self.stop_ids = tokenizer, stop_texts, stop_ids
        self.shown, self.held = [], ""  # what was printed, piece by piece; what may begin a stop text
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token):
        """Add a token -> whether a stop text has ended the answer. Special tokens and padding ids are not printed."""
        if token not in self.tokenizer.text_ids:
            return False
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        ends = [self.held.index(stop) for stop in self.stop_texts if stop in self.held]
        if ends:
            self.held = self.held[: min(ends)]
            self.decoder.reset()  # what follows the stop text is not the answer's
        partial = (k for stop in self.stop_texts for k in range(1, len(stop)) if self.held.endswith(stop[:k]))
        safe = len(self.held) - max(partial, default=0)
        self.shown.append(self.held[:safe])
        self.held = self.held[safe:]
        print(self.shown[-1], end="", flush=True)
        return bool(ends)

    def on_tokens(self, ids, live):
        """What `generate` calls with the token of the one row: (1,), (1,) -> (1,) bool, whether a stop text has ended
        it; None if there is no text in it."""
        is_text = live[0] and ids[0].item() not in self.stop_ids
        return torch.tensor([self.add(ids[0].item())]) if is_text else None

    def end(self):
        """Print the text that was held back, � for a character that is not whole; returns the whole text."""
        self.held += self.decoder.decode(b"", final=True)
        print(self.held, flush=True)
        return "".join([*self.shown, self.held])
