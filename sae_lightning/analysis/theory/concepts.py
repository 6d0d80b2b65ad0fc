"""Concepts that anyone can see in English text, as word lists and patterns.

text     Thou  shalt  not  kill  .         one string, of the tokens as they read
thou     ^^^^                              a pattern's matches, in characters
tokens   [Th][ou][ shalt][ not][ kill][.]
member    1   1     0       0     0    0   a token belongs if it holds a character of a match
"""

import re
from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Concept(NamedTuple):
    """Something that some tokens are about, and others are not."""

    name: str
    """A few words."""
    pattern: re.Pattern
    """Its matches are the concept's places."""


def _words(name: str, words: str) -> Concept:
    """A concept whose places are whole words, in upper or lower case."""
    return Concept(name, re.compile(rf"\b(?:{'|'.join(words.split())})\b", re.IGNORECASE))


def _pattern(name: str, pattern: str) -> Concept:
    return Concept(name, re.compile(pattern))


CONCEPTS = [
    _words("articles", "a an the"),
    _words(
        "prepositions",
        """of in on at by with from upon under over through against between among beneath beyond
        within without into unto above below behind before after toward towards near""",
    ),
    _words("conjunctions", "and or but if yet because although though unless whether"),
    _words("negation", "not no never none nothing nor neither nought naught cannot nobody nowhere"),
    _words("I", "I me my mine myself"),
    _words("you", "you your yours yourself yourselves"),
    _words("thou", "thou thee thy thine thyself ye"),
    _words("he and she", "he him his himself she her hers herself"),
    _words(
        "question words", "who what where when why how which whose whom wherefore whence whither"
    ),
    _words(
        "modal verbs",
        """can could may might must shall should will would canst couldst mayst shalt shouldst wilt
        wouldst""",
    ),
    _words(
        "speaking",
        """say says said saith speak speaks spoke spoken tell tells told ask asks asked answer
        answers answered call called cry cried swear swears sworn talk talks""",
    ),
    _words(
        "seeing and hearing",
        "see sees saw seen look looks looked hear hears heard behold watch listen gaze eyes ears",
    ),
    _words(
        "kinship",
        """father fathers mother mothers son sons daughter daughters brother brothers sister sisters
        uncle aunt cousin cousins wife wives husband husbands child children parent parents nephew
        niece grandfather grandmother family""",
    ),
    _words(
        "royalty and rank",
        """king kings queen queens prince princes princess crown throne majesty royal highness duke
        dukes duchess lord lords lady ladies earl emperor caesar kingdom noble nobles sir""",
    ),
    _words(
        "parts of the body",
        """head heads hand hands eye eyes heart hearts face faces foot feet arm arms tongue tongues
        blood lip lips breast ear ears hair bone bones brain brains cheek cheeks finger fingers neck
        knee knees throat nose mouth skin flesh body bodies leg legs""",
    ),
    _words(
        "animals",
        """dog dogs cat cats horse horses lion lions bird birds bear bears wolf wolves sheep lamb
        lambs fox eagle serpent serpents snake ass bull cow cows crow crows dove doves fish fly
        flies mouse rat rats swine hog toad spider worm worms beast beasts hound hounds deer hare
        raven""",
    ),
    _words(
        "colours",
        """red white black green blue yellow golden silver purple scarlet crimson grey gray brown
        pale rosy""",
    ),
    Concept(
        "numbers",
        re.compile(
            r"\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty"
            r"|fifty|sixty|hundreds?|thousands?|million|first|second|third|twice|thrice|\d[\d,.]*)\b",
            re.IGNORECASE,
        ),
    ),
    _words(
        "time",
        """day days night nights hour hours morning morrow to-morrow tomorrow today to-day yesterday
        year years month months week weeks time times evening noon minute minutes moment now then
        soon midnight""",
    ),
    _words(
        "weather and sky",
        """rain wind winds storm storms tempest thunder lightning cloud clouds snow frost sun moon
        star stars sky skies weather heaven heavens winter summer spring""",
    ),
    _words(
        "war",
        """war wars sword swords battle battles soldier soldiers army armies fight fights fought
        enemy enemies foe foes arms armour siege march drum drums weapon weapons victory conquer
        captain wound wounds dagger shield spear""",
    ),
    _words(
        "death",
        """death dead die dies died dying kill kills kill'd killed murder murders murder'd murderer
        slain slay grave graves tomb corpse ghost ghosts funeral bury buried perish hang poison
        deaths""",
    ),
    _words(
        "love",
        """love loves lover lovers loved loving beloved kiss kisses sweet sweetheart dear dearest
        affection marry married marriage wed wedding desire beauty""",
    ),
    _words(
        "religion",
        """god gods heaven heavens hell devil devils soul souls pray prayer prayers holy church
        angel angels saint saints sin sins bless blessed priest divine bishop cardinal amen jesus
        christ grace""",
    ),
    _words(
        "feelings",
        """joy joys grief griefs sorrow sorrows fear fears anger angry rage hate hates happy sad
        weep weeps tears shame pity proud pride hope hopes despair merry jealous fury""",
    ),
    _words(
        "money",
        """gold money ducats pound pounds purse pay pays paid coin coins price rich riches poor
        wealth debt sell buy bought sold cost dollars""",
    ),
    _words(
        "interjections",
        "o oh ah alas alack fie ay nay yea prithee pray farewell welcome hail ha ho lo",
    ),
    _pattern("words with an apostrophe", r"(?i)\b\w+['’]\w+|(?<!\w)['’]t(?:is|was|were|will)\b"),
    _pattern("words in -ing", r"(?i)\b[a-z]*[aeiouy][a-z]*ing\b"),
    _pattern("words in -ly", r"(?i)\b[a-z]{3,}ly\b"),
    _pattern("capitals in mid-sentence", r"(?<=[a-z,;] )(?!I\b)[A-Z][a-z]+"),
    _pattern("starts of lines", r"(?<=\n)\S"),
    _pattern("ends of sentences", r"[.!?](?=['\"’”)\]]*\s|$)"),
    _pattern("question marks", r"\?"),
    _pattern("names of speakers", r"\*\*[A-Z][^*\n]{0,40}\*\*|(?<=\n)[A-Z][A-Z' ]{2,30}(?=[:.]\s)"),
    _pattern("stage directions", r"(?<![\w_])_[^_\n]{2,200}_(?![\w_])|\[[^\]\n]{2,200}\]"),
]


def members(pieces: list[str], concepts: list[Concept] = CONCEPTS) -> Tensor:
    """Which tokens, given as they read, belong to which concept: bool [tokens, concepts]."""
    text, ends = "".join(pieces), list(accumulate(map(len, pieces)))
    found = torch.zeros(len(pieces), len(concepts), dtype=torch.bool)
    for column, concept in enumerate(concepts):
        for match in concept.pattern.finditer(text):
            first, last = bisect_right(ends, match.start()), bisect_right(ends, match.end() - 1)
            found[first : last + 1, column] = True
    return found
