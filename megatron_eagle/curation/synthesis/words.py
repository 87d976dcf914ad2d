# ruff: noqa: E501  words
"""What made pages say: words of several scripts, names of things, and what charts are about."""

import random

SCRIPTS: dict[str, str] = {
    "latin": "river morning window garden letter market bridge silver autumn paper engine harbour forest candle mountain "
    "yellow kitchen station journey village copper summer signal island winter thunder basket ribbon castle meadow "
    "Straße café naïve façade jalapeño über Ærø smörgås łódź année",
    "cyrillic": "река утро окно сад письмо рынок мост серебро осень бумага двигатель гавань лес свеча гора жёлтый кухня "
    "станция дорога деревня медь лето сигнал остров зима гром корзина лента замок луг ёлка щука объект",
    "greek": "ποταμός πρωί παράθυρο κήπος γράμμα αγορά γέφυρα ασήμι φθινόπωρο χαρτί μηχανή λιμάνι δάσος κερί βουνό κίτρινο "
    "κουζίνα σταθμός ταξίδι χωριό χαλκός καλοκαίρι σήμα νησί χειμώνας βροντή καλάθι κάστρο λιβάδι",
    "han": "河流 早晨 窗户 花园 信件 市场 桥梁 白银 秋天 纸张 引擎 港口 森林 蜡烛 山峰 黄色 厨房 车站 旅行 村庄 铜器 夏天 信号 岛屿 冬天",
    "kana": "かわ あさ まど にわ てがみ いちば はし ぎん あき かみ エンジン みなと もり ろうそく やま きいろ だいどころ えき たび むら",
    "hangul": "강 아침 창문 정원 편지 시장 다리 은 가을 종이 엔진 항구 숲 촛불 산 노란색 부엌 역 여행 마을 구리 여름 신호 섬 겨울",
}
UNSPACED = ("han", "kana")  # scripts written without spaces
SIGNS = "0123456789.,:;-/#%()"
FIELDS = ("Name", "Date", "Order", "Room", "Street", "Phone", "Reference", "Amount")
GOODS = ("Bread", "Milk", "Tea", "Soap", "Apples", "Rice", "Pencil", "Lamp", "Batteries", "Notebook", "Cheese", "Honey")
TOTAL = "Total"
TOPICS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("city", ("Oslo", "Rome", "Bern", "Lima", "Cairo", "Hanoi", "Quito", "Dakar", "Perth", "Kyoto")),
    ("month", ("January", "February", "March", "April", "May", "June", "July", "August")),
    ("product", ("Chairs", "Lamps", "Tables", "Shelves", "Carpets", "Mirrors", "Clocks")),
    ("year", tuple(map(str, range(2012, 2026)))),
    ("country", ("Kenya", "Brazil", "Japan", "Canada", "Norway", "India", "Peru", "Egypt", "Spain")),
    ("department", ("Sales", "Research", "Support", "Design", "Legal", "Finance", "Logistics")),
)  # fmt: skip
MEASURES: tuple[tuple[str, int, int, int], ...] = (  # name, least, most, decimals
    ("visitors in thousands", 5, 400, 0), ("sales in million dollars", 1, 90, 1), ("share in percent", 2, 60, 0),
    ("mean temperature", 1, 35, 1), ("rainfall in millimetres", 10, 250, 0), ("employees", 3, 900, 0),
)  # fmt: skip
SERIES = ("North", "South", "East", "West", "Online", "Stores")


def phrase(script: str, count: int, choose: random.Random) -> str:
    """So many words of a script, a number among them now and then."""
    words = SCRIPTS[script].split()
    found = [choose.choice(words) if choose.random() > 0.12 else number(choose) for _ in range(count)]
    return ("" if script in UNSPACED else " ").join(found)


def number(choose: random.Random) -> str:
    """A number, a date, a time or a price."""
    return choose.choice((
        str(choose.randint(1, 9999)), f"{choose.randint(1, 28):02}/{choose.randint(1, 12):02}/{choose.randint(1990, 2029)}",
        f"{choose.randint(0, 23):02}:{choose.randint(0, 59):02}", price(choose), f"#{choose.randint(100, 999)}",
        f"{choose.randint(1, 100)}%",
    ))  # fmt: skip


def price(choose: random.Random) -> str:
    """With two decimals."""
    return f"{choose.randint(1, 99)}.{choose.randint(0, 99):02}"
