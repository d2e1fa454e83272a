"""The photographs in packages of Debian 12: which, where, under which licence. Drawn wallpapers are left out.

Licences are those of each package's debian/copyright. "(package)" marks the licence of a whole package that
has no entry for the photo itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final


@dataclass(frozen=True)
class Photo:
    """One photo of a package."""

    path: str  # path inside the package; an Edje theme (`.edj`) stands for the largest JPEG inside it
    name: str  # stem of the photo as written
    licence: str  # licence, and the author where one is named


@dataclass(frozen=True)
class Package:
    """A Debian package, pinned."""

    name: str
    version: str
    sha256: str  # of the .deb file
    megabytes: int  # size of the .deb file, rounded up
    photos: tuple[Photo, ...]
    architecture: str = "all"


def _photos(template: str, files: str, licence: str) -> tuple[Photo, ...]:
    """Photos whose paths differ in one part; that part names them."""
    return tuple(
        Photo(template.format(file), PurePosixPath(file).stem.lower(), licence) for file in files.split()
    )


_LOMIRI = "usr/share/backgrounds/{}.jpg"
_MATE = "usr/share/backgrounds/mate/nature/{}.jpg"

PACKAGES: Final = (
    Package(
        "enlightenment-data",
        "0.25.4-2",
        "205df83b80b3a999757b07d7ad1908332c96c6edae559548346bc8af4f292bef",
        401,
        _photos(
            "usr/share/enlightenment/data/backgrounds/{}.edj",
            """Bamboo Foggy-Trees God-Rays Green-Maple Lichen-Branches Mountain Peaks Red-Maple
            Sea-of-Lanterns Snow-Trees Spruce-Needles Sunset-Clouds White-Flower Yellow-Flower""",
            "BSD-2-Clause (package)",
        ),
    ),
    Package(
        "lomiri-wallpapers-16.04",
        "20.04.0-2",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        16,
        _photos(
            _LOMIRI,
            """aitzgorri_by_Aitzol_Berasategi friends_by_Aitzol_Berasategi life_by_Aitzol_Berasategi
            picosdeeuropa_by_Aitzol_Berasategi sunset_by_Aitzol_Berasategi""",
            "CC-BY-4.0, Aitzol Berasategi",
        )
        + _photos(_LOMIRI, "Picture_0B_by_freespace Picture_1A_by_freespace", 'CC-BY-4.0, Trevor "Freespace"')
        + _photos(_LOMIRI, "Wine_by_Jakkub_Mede", "CC-BY-4.0, Jakub Mede")
        + _photos(_LOMIRI, "Bridge_by_Sander_Klootwijk", "CC-BY-SA-4.0, Sander Klootwijk")
        + _photos(_LOMIRI, "Dragonfly_by_Bolly", 'CC-BY-SA-4.0, "Bolly"')
        + _photos(_LOMIRI, "free_by_Peter_Nerlich greentock_by_Peter_Nerlich", "CC-BY-SA-4.0, Peter Nerlich")
        + _photos(_LOMIRI, "seeding_by_Clements_Engelhardt", "CC0-1.0, Clemens Engelhardt"),
    ),
    Package(
        "lomiri-wallpapers-20.04",
        "20.04.0-2",
        "d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709",
        12,
        _photos(_LOMIRI, "Kleiber_by_Lukas_Baubkus", "CC-BY-SA-3.0, Lukas Baubkus"),
    ),
    Package(
        "mate-backgrounds",
        "1.26.0-1",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        47,
        _photos(_MATE, "Aqua Garden LadyBird YellowFlower", "GPL-2.0-or-later, Charles Barbin")
        + _photos(_MATE, "Blinds", "GPL-2.0-or-later, Lennart Poettering and Andrea Cimitan")
        + _photos(_MATE, "Dune", "GPL-2.0-or-later, Marco Cogoni and Hylke Bons")
        + _photos(_MATE, "FreshFlower", "GPL-2.0-or-later, Jens Ansorg")
        + _photos(_MATE, "GreenMeadow", "GPL-2.0-or-later, Timothy Schellhase and Lapo Calamandrei")
        + _photos(_MATE, "RainDrops", 'GPL-2.0-or-later, "blackcombwhistler07"')
        + _photos(_MATE, "Storm", "GPL-2.0-or-later, Sergey Nazarov")
        + _photos(_MATE, "TwoWings", "GPL-2.0-or-later, Charles Barbin and Hylke Bons")
        + _photos(_MATE, "Wood", "GPL-2.0-or-later, Jean-François Fortin Tam"),
    ),
    Package(
        "plasma-workspace-wallpapers",
        "4:5.27.5-2",
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        95,
        _photos(
            "usr/share/wallpapers/{}/contents/images/2560x1600.jpg",
            """BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut
            Path summer_1am""",
            "GPL-2.0-or-later (package)",
        ),
    ),
    Package(
        "lxqt-themes",
        "1.2.0-1",
        "d518df36b515b09d36cb00b12645dd8ce170bb82bb0966297741905ce3edc8e1",
        26,
        _photos(
            "usr/share/lxqt/wallpapers/{}",
            """Butterfly-Kenneth-Wimer.jpg Valendas.png after-the-rain.jpg appleflower.png beam.png
            butterfly.png cloud.png drop.png flowers.png fog.jpg this-is-not-windows.jpg""",
            "LGPL-2.1-or-later (package)",
        ),
    ),
    Package(
        "palapeli-data",
        "4:22.12.3-1",
        "69a15dce2ac25ed8708ac518cd0cee5f4eb0c70ed15da2fdb8899a19ac0ee058",
        3,
        _photos(
            "usr/share/palapeli/collection/{}.jpg",
            "cincinnati-bridge citrus-fruits european-honey-bee panther-chameleon-female",
            "GPL-2.0-or-later (package)",
        ),
    ),
    Package(
        "budgie-core",
        "10.7.1-1",
        "e4332264d2fd3e488f8122673310c196ed723fbb710030f7c7df1b0f4bd6ec3b",
        3,
        _photos("usr/share/backgrounds/budgie/{}.jpg", "default", "CC0-1.0, Budgie Desktop Developers"),
        architecture="amd64",
    ),
    Package(
        "sddm-theme-maldives",
        "0.19.0-5",
        "d19c0004785df6bccdee3090a0b2cf606fe5dc074183a478bdeb04094ff728e6",
        2,
        _photos("usr/share/sddm/themes/maldives/{}.jpg", "background", "CC-BY-3.0, Nevit Dilmen"),
    ),
    Package(
        "digikam-data",
        "4:7.9.0-1",
        "a941a504ba7bdf9d276a43ca3c2a0b2b5b74a55420d8c4b4f29d681e96cbf450",
        12,
        _photos("usr/share/digikam/about/images/{}.jpg", "body-background", "GPL-2.0-or-later (package)"),
    ),
    Package(
        "qtdeclarative5-examples",
        "5.15.8+dfsg-3",
        "1602b071cdf66fa4711a47e0e341f4a4f70127c3ebfd7bbef1206a24dd488108",
        6,
        _photos(
            "usr/lib/x86_64-linux-gnu/qt5/examples/quick/customitems/scrollbar/pics/{}.jpg",
            "niagara_falls",
            "BSD-3-Clause (package)",
        ),
        architecture="amd64",
    ),
)
"""All packages; 70 photos, about 0.6 GB to fetch, two thirds of it enlightenment-data."""
