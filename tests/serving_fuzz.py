"""Seeded hostile and odd requests as raw bytes, how they are sent, and what every answer must be."""

import io
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from PIL import Image
from serving_images import animated, archive, encoded, huge_png

from serving.errors import CODES

PATIENCE_S = 5.0
"""Time for an answer; more of it is a finding."""
LINGER_S = 0.25
"""How long an answer to something that is hardly a request is waited for."""


@dataclass(frozen=True)
class Input:
    """One request.

    Attributes:
        kind: what was done to it.
        allowed: statuses that it may get besides those of every request: 429, 503, 504, 507 and what `strict` says.
        strict: whether it is a request of HTTP, which must be answered: if so, in the one format.
    """

    kind: str
    content: bytes
    strict: bool = True
    must_be: int | None = None


@dataclass(frozen=True)
class Answer:
    """What came back; status 0 if nothing did."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float


def request(path: str, content_type: str, body: bytes, key: str, method: str = "POST") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    return f"{head}Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode("latin-1") + body


def form(*files: bytes, field: str = "image") -> tuple[str, bytes]:
    part = f'--xyz\r\nContent-Disposition: form-data; name="{field}"; filename="a"\r\n\r\n'.encode()
    return "multipart/form-data; boundary=xyz", b"".join(part + file + b"\r\n" for file in files) + b"--xyz--\r\n"


# Images


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def overlapping_exif(entries: int, size: int) -> bytes:
    """An Exif directory each of whose values is all of its bytes: PIL would copy entries x size bytes."""
    head = b"II*\0" + struct.pack("<LH", 8, entries)
    values = b"".join(struct.pack("<HHLL", tag + 1, 7, size - 8, 8) for tag in range(entries))
    return (head + values).ljust(size, b"\0")


def good_images() -> dict[str, bytes]:
    """Every kind of still image that people have, which must be taken."""

    def saved(image: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    with Image.open(io.BytesIO(encoded("PNG"))) as opened:
        rgb = opened.convert("RGB")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description " * 20
    rgba = rgb.convert("RGBA")
    rgba.putalpha(rgb.convert("L"))
    profile = {"icc_profile": bytes(3000)}
    return {
        "jpeg": saved(rgb, "JPEG", exif=exif, **profile),
        "progressive": saved(rgb, "JPEG", progressive=True),
        "grey jpeg": saved(rgb.convert("L"), "JPEG"),
        "cmyk jpeg": saved(rgb.convert("CMYK"), "JPEG"),
        "jpeg with a preview": animated("MPO"),
        "png": saved(rgb, "PNG", exif=exif, **profile),
        "16-bit png": saved(rgb.convert("I;16"), "PNG"),
        "1-bit png": saved(rgb.convert("1"), "PNG"),
        "grey png": saved(rgb.convert("L"), "PNG"),
        "palette png": saved(rgb.convert("P"), "PNG", transparency=3),
        "alpha png": saved(rgba, "PNG"),
        "one pixel": saved(Image.new("RGB", (1, 1)), "PNG"),
        "a line": saved(Image.new("RGB", (3000, 1)), "PNG"),
        "webp": saved(rgb, "WEBP", exif=exif, **profile),
        "lossless webp": saved(rgba, "WEBP", lossless=True),
    }


def heavy_images() -> dict[str, bytes]:
    """Small files that would take minutes or gigabytes in PIL's parsers, which must be refused with 4xx."""
    jpeg, png, webp = (encoded(kind) for kind in ("JPEG", "PNG", "WEBP"))
    exif = overlapping_exif(5000, 65_000)
    icc = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000)))
    headers, scan = b"Exif\0\0" * 100_000, jpeg.index(b"\xff\xda")
    many = b"II*\0" + struct.pack("<LH", 8, 5_000) + struct.pack("<HHLL", 1, 3, 1, 0) * 5_000
    nested = webp[8:] + b"EXIF" + struct.pack("<L", len(headers)) + headers
    body = webp[8:] + b"EXIF" + struct.pack("<L", 200_000) + overlapping_exif(10_000, 200_000)
    return {
        "exif values over one another": jpeg[:2] + jpeg_segment(0xE1, b"Exif\0\0" + exif) + jpeg[2:],
        "two headers of exif": jpeg[:2] + jpeg_segment(0xE1, b"Exif\0\0Exif\0\0" + exif) + jpeg[2:],
        "mpf values over one another": jpeg[:2] + jpeg_segment(0xE2, b"MPF\0" + exif) + jpeg[2:],
        "png exif": png[:33] + png_chunk(b"eXIf", overlapping_exif(20_000, 500_000)) + png[33:],
        "png exif as text": png[:33]
        + png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(exif))
        + png[33:],
        "webp exif": b"RIFF" + struct.pack("<L", len(body)) + body,
        "exif in pieces": jpeg[:2] + jpeg_segment(0xE1, b"Exif\0\0" + bytes(9)) * 40_000 + jpeg[2:],
        "jpeg segments": jpeg[:2] + b"\xff\xe5\0\2" * 200_000 + jpeg[2:],
        "jpeg fill": jpeg[:2] + b"\xff" * 900_000 + jpeg[2:],
        "png chunks": png[:33] + png_chunk(b"teSt", b"") * 70_000 + png[33:],
        "png pixels in pieces": png[:33] + png_chunk(b"IDAT", b"") * 70_000 + png[33:],
        "png profiles": png[:33] + icc * 800 + png[33:],
        "png text": png[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 90 + png[33:],
        "png exif of headers": png[:33] + png_chunk(b"eXIf", headers) + png[33:],
        "webp exif of headers": b"RIFF" + struct.pack("<L", len(nested)) + nested,
        "jpeg exif of headers": jpeg[:2] + jpeg_segment(0xE1, headers[:60_000]) * 10 + jpeg[2:],
        "jpeg exif and scans": jpeg[:2] + jpeg_segment(0xE1, b"Exif\0\0" + many) + jpeg[2:scan] + jpeg[scan:-2] * 101,
        "bomb": huge_png(30_000, 30_000),
        "100 megapixels": huge_png(10_000, 10_000),
    }


def _flipped(random: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 3, 30))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _truncated(random: Random, content: bytes) -> bytes:
    return content[: random.randrange(len(content))]


def _shuffled(random: Random, content: bytes) -> bytes:
    """Pieces between what looks like a header of a chunk or segment, in another order, doubled or left out."""
    cuts = [found.start() for found in re.finditer(rb"\xff[\xc0-\xfe]|IDAT|IHDR|IEND|VP8|EXIF", content)]
    cuts = sorted(random.sample(cuts, min(len(cuts), 8)))
    pieces = [content[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
    random.shuffle(pieces)
    return b"".join(pieces[: random.randint(1, len(pieces))] + pieces[:1])


def _with_other_numbers(random: Random, content: bytes) -> bytes:
    """Two or four bytes, as lengths and sizes are, set to odd values; a PNG's checksums are made right again."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        value = random.choice((0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))
        number = value.to_bytes(4, random.choice(("big", "little")))[random.choice((0, 2)) :]
        at = random.randrange(min(len(changed), 400))
        changed[at : at + len(number)] = number
    return _with_checksums(bytes(changed)) if random.random() < 0.7 else bytes(changed)


def _with_checksums(content: bytes) -> bytes:
    at, out = 8, bytearray(content)
    while content[:4] == b"\x89PNG" and at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        if end + 4 > len(content):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return bytes(out)


def _spliced(random: Random, content: bytes) -> bytes:
    other = random.choice(list(good_images().values()))
    return content[: random.randrange(len(content))] + other[random.randrange(len(other)) :]


def _filled(random: Random, content: bytes) -> bytes:
    at = random.randrange(len(content))
    return content[:at] + random.choice((b"\0", b"\xff", b"\xff\xd9", random.randbytes(7))) * 300 + content[at:]


def _followed(random: Random, content: bytes) -> bytes:
    return content + random.choice((b"", b"\0\n", b"\xff\xd8\xff\xd9")) + archive()


IMAGE_MUTATIONS: dict[str, Callable[[Random, bytes], bytes]] = {
    "bits flipped": _flipped,
    "truncated": _truncated,
    "chunks shuffled": _shuffled,
    "lengths changed": _with_other_numbers,
    "spliced": _spliced,
    "filled": _filled,
    "archive behind": _followed,
}


def images(random: Random, n: int, key: str) -> Iterator[Input]:
    good, heavy = good_images(), heavy_images()
    for content in good.values():
        yield Input("image: whole", request("/predict", *form(content), key), must_be=200)
    for name, content in heavy.items():
        yield Input(f"image: heavy ({name})", request("/predict", *form(content), key))
    for _ in range(max(0, n - len(good) - len(heavy))):
        kind = random.choice(list(IMAGE_MUTATIONS))
        mutated = [
            IMAGE_MUTATIONS[kind](random, random.choice(list(good.values())))
            for _ in range(random.choice((1, 1, 1, 4)))
        ]
        batch = len(mutated) > 1
        body = form(*mutated, field="images" if batch else "image")
        yield Input(f"image: {kind}", request("/predict_batch" if batch else "/predict", *body, key))


# Forms


def forms(random: Random, n: int, key: str) -> Iterator[Input]:
    image = encoded("JPEG", (16, 16))
    disposition = b'Content-Disposition: form-data; name="image"; filename="a"'
    whole = b"--xyz\r\n" + disposition + b"\r\n\r\n" + image + b"\r\n--xyz--\r\n"
    bodies = {
        "twice": whole.replace(b"--xyz--\r\n", b"") + whole,
        "no end": whole.replace(b"--xyz--", b""),
        "no file name": whole.replace(b'; filename="a"', b""),
        "other name": whole.replace(b'"image"', b'"picture"'),
        "no name": whole.replace(b'name="image"; ', b""),
        "nul in name": whole.replace(b'"image"', b'"ima\0ge"'),
        "name in two": whole.replace(b'"image"', b'"image"; name="images"'),
        "name by RFC 2231": whole.replace(b'name="image"', b"name*=utf-8''image"),
        "broken RFC 2231": whole.replace(b'filename="a"', b"filename*=utf-8'%FF%ZZ"),
        "long name": whole.replace(b'"a"', b'"' + b"a" * 100_000 + b'"'),
        "many headers": whole.replace(disposition, disposition + b"\r\nA: b" * 20_000),
        "long header": whole.replace(disposition, disposition + b"\r\nA: " + b"b" * 100_000),
        "nested": whole.replace(image, b"--inner\r\n" + disposition + b"\r\n\r\nx\r\n--inner--"),
        "many parts": (b"--xyz\r\n" + disposition + b"\r\n\r\n\r\n") * 20_000 + b"--xyz--\r\n",
        "many fields": b'--xyz\r\nContent-Disposition: form-data; name="overlay"\r\n\r\ntrue\r\n' * 20_000
        + b"--xyz--\r\n",
        "long field": b'--xyz\r\nContent-Disposition: form-data; name="overlay"\r\n\r\n'
        + b"a" * 900_000
        + b"\r\n--xyz--\r\n",
        "base64": whole.replace(disposition, disposition + b"\r\nContent-Transfer-Encoding: base64"),
        "bare newlines": whole.replace(b"\r\n", b"\n"),
        "empty": b"",
    }
    types = {
        "no boundary": "multipart/form-data",
        "other boundary": "multipart/form-data; boundary=abc",
        "long boundary": f"multipart/form-data; boundary={'x' * 3000}",
        "empty boundary": "multipart/form-data; boundary=",
        "quoted": 'multipart/form-data; boundary="xyz',
        "punycode": "multipart/form-data; boundary=xyz; charset=punycode",
        "utf-7": "multipart/form-data; boundary=xyz; charset=utf-7",
        "zlib": "multipart/form-data; boundary=xyz; charset=zlib",
        "idna": "multipart/form-data; boundary=xyz; charset=idna",
        "by RFC 2231": "multipart/form-data; boundary*=utf-8''xyz",
        "mixed": "multipart/mixed; boundary=xyz",
        "json": "application/json",
        "pickle": "application/vnd.bentoml+pickle",
        "none": "",
        "high bytes": "multipart/form-data; boundary=\xe9\xff",
    }
    kinds = ["as it is", *bodies, *types, "bytes changed"]
    for number in range(n):
        kind = (
            kinds[number] if number < len(kinds) else "bytes changed" if random.random() < 0.6 else random.choice(kinds)
        )
        content_type = types.get(kind, "multipart/form-data; boundary=xyz")
        body = bodies.get(kind, whole)
        if kind == "bytes changed":
            at = random.randrange(len(whole) - len(image) + 1)
            at += len(image) if at > whole.index(image) else 0
            body = (
                whole[:at] + random.choice((b"", b"\0", b"\r\n", b'"', b"--xyz", random.randbytes(3))) + whole[at + 1 :]
            )
        path = random.choice(("/predict", "/predict", "/predict_batch"))
        yield Input("form", request(path, content_type, body, key))


# JSON


def orders(random: Random, n: int, key: str, label: str) -> Iterator[Input]:
    odd = [
        *("NaN", "Infinity", "-Infinity", "1e400", "-0", "1e-400", "0x10", "01", "1.", ".5", "+1", "1_000", "9" * 4000),
        *(
            "-9223372036854775809",
            "18446744073709551616",
            "null",
            "true",
            '"\\ud800"',
            '"\\u0000"',
            '"\\x41"',
            '"é\x7f"',
        ),
        *("[]", "{}", "[" * 5000, '{"a":' * 2000, '"' + "a" * 5000 + '"', "'x'", "", ",", "/*x*/1", '"\n"', "1 2"),
    ]
    fields = ("label", "n", "seed", "truncation", "format", "extra", "__proto__", "label")
    for _ in range(n):
        pairs = [f'"label": {json.dumps(label)}', '"n": 1']
        pairs += [f'"{random.choice(fields)}": {random.choice(odd)}' for _ in range(random.randint(1, 2))]
        random.shuffle(pairs)
        text = "{" + ", ".join(pairs) + "}"
        body = random.choice(
            (
                text.encode(),
                text.encode(),
                text.encode(),
                b"\xef\xbb\xbf" + text.encode(),
                text.encode("utf-16"),
                text.encode("utf-32-be"),
                text.encode().replace(b"a", b"\xff"),
                text.encode() + b"\0" * random.randrange(3),
                text.encode()[: random.randrange(len(text))],
                f"[{text}]".encode(),
            )
        )
        content_type = random.choice(
            ("application/json", "application/json", "application/json; charset=utf-16", "text/json")
        )
        path = random.choice(("/generate", "/generate", "/generate_batch/submit"))
        yield Input("json", request(path, content_type, body, key))


# What is hardly HTTP


def raw(random: Random, n: int, key: str) -> Iterator[Input]:
    auth = f"Host: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n".encode()
    body = b'{"label": "x", "n": 1}'
    post = b"POST /generate HTTP/1.1\r\n" + auth + b"Content-Type: application/json\r\n"
    length = b"Content-Length: %d\r\n" % len(body)
    chunked = b"Transfer-Encoding: chunked\r\n"
    one_chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    targets = [
        b"/model",
        b"http://127.0.0.1/model",
        b"http://evil.example/model",
        b"//model",
        b"/../model",
        b"/%6dodel",
        b"/model%00",
        b"/model%0d%0aX:1",
        b"/generated/..%2f..%2fetc%2fpasswd",
        b"/%zz%u1234%ff",
        b"/generate_batch/status?task_id=%ff%00&task_id=",
        b"/" + b"a" * 60_000,
        b"/" + b"a" * 900_000,
        b"/model?" + b"a=b&" * 10_000,
    ]
    odd_headers = [
        b"A: b\r\n" * 5_000,
        b"A: b\r\n" * 200_000,
        b"A: " + b"b" * 900_000 + b"\r\n",
        b"A: b\r\n c\r\n",
        b"A : b\r\n",
        b"A\r\n",
        b"A: \0\r\n",
        b"Host: evil.example\r\n",
        b"X-Request-ID: a\tb\xff\r\n",
        b"Range: bytes=" + b"0-1," * 5000 + b"\r\n",
    ]
    whole = [
        *(b"GET " + target + b" HTTP/1.1\r\n" + auth + b"\r\n" for target in targets),
        *(b"GET /model HTTP/1.1\r\n" + auth + headers + b"\r\n" for headers in odd_headers),
        b"GET / HTTP/1.1\r\n" + auth + b"Range: bytes=5-2\r\n\r\n",
        b"GET /model HTTP/1.1\r\n" + auth + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"GET /model HTTP/1.1\r\n" + auth + b"Upgrade: h2c\r\nConnection: upgrade\r\nHTTP2-Settings: AAA\r\n\r\n",
        b"GET /model HTTP/1.0\r\n\r\n",
        b"GET /model HTTP/0.9\r\n\r\n",
        b"GET /model HTTP/9.9\r\n\r\n",
        b"GET /model\r\n",
        b"GET\r\n\r\n",
        b"\r\n\r\n\r\nGET /model HTTP/1.1\r\n" + auth + b"\r\n",
        b"get /model HTTP/1.1\r\n" + auth + b"\r\n",
        b"BREW /model HTTP/1.1\r\n" + auth + b"\r\n",
        b"CONNECT 127.0.0.1:1 HTTP/1.1\r\n" + auth + b"\r\n",
        b"OPTIONS * HTTP/1.1\r\n" + auth + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        post + length + chunked + b"\r\n" + one_chunk,
        post + chunked + length + b"\r\n" + body,
        post + length + length + b"\r\n" + body,
        post + length + b"Content-Length: 5\r\n\r\n" + body,
        post + b"Content-Length: -1\r\n\r\n" + body,
        post + b"Content-Length: 99999999999999999999999\r\n\r\n" + body,
        post + b"Content-Length: 1e2\r\n\r\n" + body,
        post + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + one_chunk,
        post + b"Transfer-Encoding: chunked, identity\r\n\r\n" + one_chunk,
        post + b"Transfer-Encoding: xchunked\r\n\r\n" + one_chunk,
        post + chunked + b"\r\n" + one_chunk,
        post + chunked + b"\r\n%x;a=b;c\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        post + chunked + b"\r\n%x;%b\r\n%b\r\n0\r\n\r\n" % (len(body), b"a" * 100_000, body),
        post + chunked + b"\r\nffffffffffffffffff\r\n" + body,
        post + chunked + b"\r\n-5\r\n" + body,
        post + chunked + b"\r\nzz\r\n" + body,
        post + chunked + b"\r\n" + b"1\r\nx\r\n" * 30_000 + b"0\r\n\r\n",
        post + chunked + b"\r\n%x\r\n%b\r\n0\r\n" % (len(body), body) + b"A: b\r\n" * 100_000 + b"\r\n",
        post + length + b"Expect: 100-continue\r\n\r\n" + body,
        post + length + b"Content-Encoding: gzip\r\n\r\n" + body,
        post + length + b"\r\n" + body + b"GET /model HTTP/1.1\r\n" + auth + b"\r\nnonsense\r\n\r\n",
    ]
    for number in range(n):
        content = whole[number] if number < len(whole) else random.choice(whole)
        if number >= len(whole):
            head, _, rest = content.partition(b"\r\n\r\n")
            content = _flipped(random, head[:2000] or b"\r\n") + b"\r\n\r\n" + rest[:2000]
        yield Input("raw", content, strict=False)


def everything(seed: int, n: int, key: str, label: str) -> Iterator[Input]:
    """`n` inputs: half of them images, the rest forms, JSON and raw bytes alike."""
    random = Random(seed)
    yield from images(random, n - 3 * (n // 6), key)
    yield from forms(random, n // 6, key)
    yield from orders(random, n // 6, key, label)
    yield from raw(random, n // 6, key)


# Sending and judging


def send(port: int, thrown: Input) -> Answer:
    """One connection, one input, the first answer."""
    began = time.perf_counter()
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S * 2) as connection:
        try:
            connection.sendall(thrown.content)
            connection.settimeout(PATIENCE_S * 2 if thrown.strict else LINGER_S)
            while not _whole(received) and (piece := connection.recv(1 << 20)):
                received += piece
        except (TimeoutError, ConnectionError):
            pass
    return _parsed(received, time.perf_counter() - began)


def _whole(received: bytes) -> bool:
    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return length is not None and len(body) >= int(length[1])


def _parsed(received: bytes, seconds: float) -> Answer:
    head, _, body = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    status = re.match(r"HTTP/1.1 (\d{3}) ", first)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(int(status[1]) if status else 0, headers, body, seconds)


def finding(thrown: Input, answer: Answer) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    if answer.seconds > PATIENCE_S + (0 if thrown.strict else LINGER_S):
        return f"took {answer.seconds:.1f} s"
    if answer.status == 0:
        return "no answer" if thrown.strict else None
    if thrown.must_be and answer.status not in (thrown.must_be, 503):
        return f"{answer.status} instead of {thrown.must_be}"
    if answer.status >= 500 and answer.status not in (503, 504, 507):
        return f"server error {answer.status}"
    if "x-content-type-options" not in answer.headers:
        return f"{answer.status} without security headers"
    return _wrong_error(answer) if answer.status >= 400 and answer.body else None


def _wrong_error(answer: Answer) -> str | None:
    try:
        detail = json.loads(answer.body[: int(answer.headers["content-length"])])["error"]
        right = CODES[detail["code"]][0] == answer.status and detail["request_id"] == answer.headers["x-request-id"]
        return None if right else f"another error than its status: {detail}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status} in another format: {answer.body[:80]!r}"
