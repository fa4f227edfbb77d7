"""Printing a text while it is generated, token by token."""

import codecs


class StreamedText:
    """Prints tokens as they are generated. An incomplete character (one can span several tokens) is held back, and so
    is text that may be the beginning of a stop text, because stop texts are never printed."""

    def __init__(self, tokenizer, stop_texts=()):
        self.tokenizer, self.stop_texts, self.text, self.shown = tokenizer, stop_texts, "", 0
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token):
        """Add a token -> whether a stop text has ended the answer. Special tokens and padding ids are not printed."""
        if token not in self.tokenizer.text_ids:
            return False
        self.text += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        ends = [self.text.index(stop) for stop in self.stop_texts if stop in self.text]
        if ends:
            self.text, safe = self.text[: min(ends)], min(ends)
        else:
            partial = (k for stop in self.stop_texts for k in range(1, len(stop)) if self.text.endswith(stop[:k]))
            safe = len(self.text) - max(partial, default=0)
        print(self.text[self.shown : safe], end="", flush=True)
        self.shown = max(self.shown, safe)
        return bool(ends)

    def end(self):
        """Print the text that was held back; returns the whole text."""
        print(self.text[self.shown :], flush=True)
        return self.text
