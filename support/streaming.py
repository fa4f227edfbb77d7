"""A text that is shown while it is written, token by token."""

import codecs


class StreamedText:
    """Prints tokens as they come: a character may span several, so an unfinished one waits; and so does an end that may
    become a stop text, which is never shown."""

    def __init__(self, tokenizer, stop_texts=()):
        self.tokenizer, self.stop_texts, self.text, self.shown = tokenizer, stop_texts, "", 0
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token):
        """-> whether a stop text has ended the answer. Special tokens and a padded vocabulary's ids are no text."""
        if token not in self.tokenizer.text_ids:
            return False
        self.text += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        ends = [self.text.index(stop) for stop in self.stop_texts if stop in self.text]
        if ends:
            self.text, safe = self.text[: min(ends)], min(ends)
        else:
            begun = (k for stop in self.stop_texts for k in range(1, len(stop)) if self.text.endswith(stop[:k]))
            safe = len(self.text) - max(begun, default=0)
        print(self.text[self.shown : safe], end="", flush=True)
        self.shown = max(self.shown, safe)
        return bool(ends)

    def end(self):
        """Print what has waited; returns the whole text."""
        print(self.text[self.shown :], flush=True)
        return self.text
