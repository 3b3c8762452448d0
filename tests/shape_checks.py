"""The checker behind the shapes in signatures; an int passes for a float, as everywhere in Python's typing."""

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
