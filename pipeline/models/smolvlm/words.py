"""Numbers in English words, as num2words writes them: so SmolVLM2's prompts count frames.

That package would bring docopt, which nobody has looked after since 2014, for these few lines.
"""

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = ((1_000_000, "million"), (1_000, "thousand"))


def in_words(number: int) -> str:
    """A number from 0 to 999,999,999: `one thousand, two hundred and five`."""
    for scale, name in _SCALES:
        if number >= scale:
            above, rest = divmod(number, scale)
            return f"{in_words(above)} {name}{_rest(rest, ' and ' if rest < 100 else ', ')}"
    if number >= 100:
        return f"{_ONES[number // 100]} hundred{_rest(number % 100, ' and ')}"
    if number >= 20:
        return f"{_TENS[number // 10 - 2]}{_rest(number % 10, '-')}"
    return _ONES[number]


def _rest(number: int, joint: str) -> str:
    return f"{joint}{in_words(number)}" if number else ""
