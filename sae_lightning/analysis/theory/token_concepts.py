"""Concepts that can be recognised in English text by word lists and patterns.

text     Thou  shalt  not  kill  .         the tokens joined into one string
thou     ^^^^                              the characters that a pattern matches
tokens   [Th][ou][ shalt][ not][ kill][.]
member    1   1     0       0     0    0   1 if the token has a matched character
"""

import re
from bisect import bisect_right
from itertools import accumulate

import torch
from torch import Tensor

# Name of a concept -> its words (some are patterns), matched as whole words, ignoring case.
WORD_LISTS = {
    "articles": "a an the",
    "prepositions": """of in on at by with from upon under over through against between among
        beneath beyond within without into unto above below behind before after toward towards
        near""",
    "conjunctions": "and or but if yet because although though unless whether",
    "negation": "not no never none nothing nor neither nought naught cannot nobody nowhere",
    "I": "I me my mine myself",
    "you": "you your yours yourself yourselves",
    "thou": "thou thee thy thine thyself ye",
    "he and she": "he him his himself she her hers herself",
    "question words": "who what where when why how which whose whom wherefore whence whither",
    "modal verbs": """can could may might must shall should will would canst couldst mayst shalt
        shouldst wilt wouldst""",
    "speaking": """say says said saith speak speaks spoke spoken tell tells told ask asks asked
        answer answers answered call called cry cried swear swears sworn talk talks""",
    "seeing and hearing": """see sees saw seen look looks looked hear hears heard behold watch
        listen gaze eyes ears""",
    "kinship": """father fathers mother mothers son sons daughter daughters brother brothers sister
        sisters uncle aunt cousin cousins wife wives husband husbands child children parent parents
        nephew niece grandfather grandmother family""",
    "royalty and rank": """king kings queen queens prince princes princess crown throne majesty
        royal highness duke dukes duchess lord lords lady ladies earl emperor caesar kingdom noble
        nobles sir""",
    "parts of the body": """head heads hand hands eye eyes heart hearts face faces foot feet arm
        arms tongue tongues blood lip lips breast ear ears hair bone bones brain brains cheek cheeks
        finger fingers neck knee knees throat nose mouth skin flesh body bodies leg legs""",
    "animals": """dog dogs cat cats horse horses lion lions bird birds bear bears wolf wolves sheep
        lamb lambs fox eagle serpent serpents snake ass bull cow cows crow crows dove doves fish fly
        flies mouse rat rats swine hog toad spider worm worms beast beasts hound hounds deer hare
        raven""",
    "colours": """red white black green blue yellow golden silver purple scarlet crimson grey gray
        brown pale rosy""",
    "numbers": r"""two three four five six seven eight nine ten eleven twelve twenty thirty forty
        fifty sixty hundreds? thousands? million first second third twice thrice \d[\d,.]*""",
    "time": """day days night nights hour hours morning morrow to-morrow tomorrow today to-day
        yesterday year years month months week weeks time times evening noon minute minutes moment
        now then soon midnight""",
    "weather and sky": """rain wind winds storm storms tempest thunder lightning cloud clouds snow
        frost sun moon star stars sky skies weather heaven heavens winter summer spring""",
    "war": """war wars sword swords battle battles soldier soldiers army armies fight fights fought
        enemy enemies foe foes arms armour siege march drum drums weapon weapons victory conquer
        captain wound wounds dagger shield spear""",
    "death": """death dead die dies died dying kill kills kill'd killed murder murders murder'd
        murderer slain slay grave graves tomb corpse ghost ghosts funeral bury buried perish hang
        poison deaths""",
    "love": """love loves lover lovers loved loving beloved kiss kisses sweet sweetheart dear
        dearest affection marry married marriage wed wedding desire beauty""",
    "religion": """god gods heaven heavens hell devil devils soul souls pray prayer prayers holy
        church angel angels saint saints sin sins bless blessed priest divine bishop cardinal amen
        jesus christ grace""",
    "feelings": """joy joys grief griefs sorrow sorrows fear fears anger angry rage hate hates happy
        sad weep weeps tears shame pity proud pride hope hopes despair merry jealous fury""",
    "money": """gold money ducats pound pounds purse pay pays paid coin coins price rich riches poor
        wealth debt sell buy bought sold cost dollars""",
    "interjections": """o oh ah alas alack fie ay nay yea prithee pray farewell welcome hail ha ho
        lo""",
}
PATTERNS = {
    "words with an apostrophe": r"(?i)\b\w+['’]\w+|(?<!\w)['’]t(?:is|was|were|will)\b",
    "words in -ing": r"(?i)\b[a-z]*[aeiouy][a-z]*ing\b",
    "words in -ly": r"(?i)\b[a-z]{3,}ly\b",
    "capitals in mid-sentence": r"(?<=[a-z,;] )(?!I\b)[A-Z][a-z]+",
    "starts of lines": r"(?<=\n)\S",
    "ends of sentences": r"[.!?](?=['\"’”)\]]*\s|$)",
    "question marks": r"\?",
    "names of speakers": r"\*\*[A-Z][^*\n]{0,40}\*\*|(?<=\n)[A-Z][A-Z' ]{2,30}(?=[:.]\s)",
    "stage directions": r"(?<![\w_])_[^_\n]{2,200}_(?![\w_])|\[[^\]\n]{2,200}\]",
}
# Name of a concept -> the pattern that matches it.
CONCEPTS = {
    name: re.compile(rf"\b(?:{'|'.join(words.split())})\b", re.IGNORECASE)
    for name, words in WORD_LISTS.items()
} | {name: re.compile(pattern) for name, pattern in PATTERNS.items()}


def tag_tokens(token_texts: list[str]) -> Tensor:
    """Mark which tokens of a text belong to which concept: bool [tokens, concepts]."""
    text, ends = "".join(token_texts), list(accumulate(map(len, token_texts)))
    is_member = torch.zeros(len(token_texts), len(CONCEPTS), dtype=torch.bool)
    for column, pattern in enumerate(CONCEPTS.values()):
        for match in pattern.finditer(text):
            # the tokens of the first and of the last character
            first, last = (bisect_right(ends, i) for i in (match.start(), match.end() - 1))
            is_member[first : last + 1, column] = True
    return is_member
