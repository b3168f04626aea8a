"""FarmHash Fingerprint64 and MurmurHash64A inside Triton kernels: the same bits as byte_hash.py, one lane per string.

A string is a place in a byte tensor and a size. Words are composed from single bytes: strings start anywhere, and a GPU's
cache serves the neighbouring bytes. Only bytes inside the string are read. Branches by length (0-16, 17-64, above 64) run
when a lane of the program needs them, the last as a loop over 64-byte chunks that ends with the program's longest string.
All arithmetic is in uint64, which wraps. A string of n bytes costs n loads and about 4 n instructions.
Sources: Pike, FarmHash 1.1 (Fingerprint64 is farmhashna::Hash64); Appleby, MurmurHash64A and MurmurHash3's finaliser.
"""

from recis_kernels.dispatch import jit, tl


@jit
def largest(block):
    """Return the greatest number of a 1-D block."""
    return tl.max(block, axis=0)


@jit
def bytes_word(data_ptr, place, size, mask):
    """Return the first min(size, 8) bytes at data[place] as a little-endian uint64; masked lanes give 0."""
    word = tl.load(data_ptr + place, mask=mask & (size > 0), other=0).to(tl.uint64)
    for i in tl.static_range(1, 8):  # type: ignore[misc]
        byte = tl.load(data_ptr + place + i, mask=mask & (size > i), other=0).to(tl.uint64)
        word = word | (byte << (8 * i))
    return word


@jit
def to_bucket(bits, buckets):
    """Return int64: the bits themselves (buckets < 0), their low 63 (0), or bits mod buckets, unsigned."""
    if buckets > 0:
        bits = bits % buckets.to(tl.uint64)
    elif buckets == 0:
        bits = bits & 0x7FFFFFFFFFFFFFFF
    return bits.to(tl.int64)


# ---- murmur


@jit
def murmur_word(mixed, word):
    word = word * 0xC6A4A7935BD1E995
    return (mixed ^ (word ^ (word >> 47)) * 0xC6A4A7935BD1E995) * 0xC6A4A7935BD1E995


@jit
def murmur_end(mixed):
    mixed = (mixed ^ (mixed >> 47)) * 0xC6A4A7935BD1E995
    return mixed ^ (mixed >> 47)


@jit
def murmur_id(value):
    """Return MurmurHash64A of the 8 bytes of int64 ids, uint64."""
    word = value.to(tl.uint64)
    return murmur_end(murmur_word((tl.zeros_like(word) + 8) * 0xC6A4A7935BD1E995, word))


@jit
def murmur_pair(first, second):
    """Return MurmurHash64A of the 16 bytes of two int64, uint64."""
    word = first.to(tl.uint64)
    mixed = murmur_word((tl.zeros_like(word) + 16) * 0xC6A4A7935BD1E995, word)
    return murmur_end(murmur_word(mixed, second.to(tl.uint64)))


@jit
def murmur_bytes(data_ptr, first, size, mask):
    """Return MurmurHash64A of the strings of a program, uint64."""
    mixed = size.to(tl.uint64) * 0xC6A4A7935BD1E995
    longest = largest(tl.where(mask, size, 0))
    for at in range(0, longest, 8):
        left = size - at
        word = bytes_word(data_ptr, first + at, left, mask)
        rest = tl.where(left > 0, (mixed ^ word) * 0xC6A4A7935BD1E995, mixed)
        mixed = tl.where(left >= 8, murmur_word(mixed, word), rest)
    return murmur_end(mixed)


# ---- farm


@jit
def _rotate(bits, BY: tl.constexpr):
    return (bits >> BY) | (bits << (64 - BY))


@jit
def _mix16(u, v, mul):
    a = (u ^ v) * mul
    a = a ^ (a >> 47)
    b = (v ^ a) * mul
    b = b ^ (b >> 47)
    return b * mul


@jit
def _multiplier(size):
    return 2 * size.to(tl.uint64) + 0x9AE16A3B2F90404F


@jit
def _farm8_16(head, tail, mul):
    a = head + 0x9AE16A3B2F90404F
    return _mix16(_rotate(tail, 37) * mul + a, (_rotate(a, 25) + tail) * mul, mul)


@jit
def farm_id(value):
    """Return Fingerprint64 of the 8 bytes of int64 ids, uint64."""
    word = value.to(tl.uint64)
    return _farm8_16(word, word, tl.zeros_like(word) + 0x9AE16A3B2F90405F)


@jit
def _farm0_16(data_ptr, first, size, mask):
    """Hash strings of up to 16 bytes; longer lanes give nonsense."""
    mul = _multiplier(size)
    length = size.to(tl.uint64)
    head = bytes_word(data_ptr, first, size, mask)
    tail = bytes_word(data_ptr, first + size - 8, tl.where(size >= 8, 8, 0), mask)
    long = _farm8_16(head, tail, mul)
    # 4 to 7 bytes: the head holds all of them, so its last four are a shift away
    shift = tl.where((size >= 4) & (size < 8), 8 * (size - 4), 0).to(tl.uint64)
    middle = _mix16(length + ((head & 0xFFFFFFFF) << 3), (head >> shift) & 0xFFFFFFFF, mul)
    small = tl.where((size >= 1) & (size < 4), size, 1)
    centre = (head >> (8 * (small >> 1)).to(tl.uint64)) & 255
    last = (head >> (8 * (small - 1)).to(tl.uint64)) & 255
    short = ((head & 255) + (centre << 8)) * 0x9AE16A3B2F90404F ^ (length + (last << 2)) * 0xC3A5C85C97CB3127
    short = (short ^ (short >> 47)) * 0x9AE16A3B2F90404F
    nothing = tl.zeros_like(head) + 0x9AE16A3B2F90404F
    return tl.where(size >= 8, long, tl.where(size >= 4, middle, tl.where(size > 0, short, nothing)))


@jit
def _farm17_64(data_ptr, first, size, mask):
    """Hash strings of 17 to 64 bytes; `mask` excludes all others."""
    mul = _multiplier(size)
    eight = tl.zeros_like(size) + 8
    end = first + size
    factor = tl.where(size <= 32, tl.zeros_like(mul) + 0xB492B66FBE98F273, tl.zeros_like(mul) + 0x9AE16A3B2F90404F)
    a = bytes_word(data_ptr, first, eight, mask) * factor
    b = bytes_word(data_ptr, first + 8, eight, mask)
    c = bytes_word(data_ptr, end - 8, eight, mask) * mul
    d = bytes_word(data_ptr, end - 16, eight, mask) * 0x9AE16A3B2F90404F
    y = _rotate(a + b, 43) + _rotate(c, 30) + d
    z = _mix16(y, a + _rotate(b + 0x9AE16A3B2F90404F, 18) + c, mul)
    large = mask & (size > 32)
    if largest(large.to(tl.int32)) > 0:
        e = bytes_word(data_ptr, first + 16, eight, large) * mul
        f = bytes_word(data_ptr, first + 24, eight, large)
        g = (y + bytes_word(data_ptr, end - 32, eight, large)) * mul
        h = (z + bytes_word(data_ptr, end - 24, eight, large)) * mul
        wide = _mix16(_rotate(e + f, 43) + _rotate(g, 30) + h, e + _rotate(f + a, 18) + g, mul)
        z = tl.where(large, wide, z)
    return z


@jit
def _weak32(data_ptr, place, eight, mask, a, b):
    fourth = bytes_word(data_ptr, place + 24, eight, mask)
    a = a + bytes_word(data_ptr, place, eight, mask)
    b = _rotate(b + a + fourth, 21)
    total = a + bytes_word(data_ptr, place + 8, eight, mask) + bytes_word(data_ptr, place + 16, eight, mask)
    return total + fourth, b + _rotate(total, 44) + a


@jit
def _farm_block(data_ptr, place, eight, mask, x, y, z, v0, v1, w0, w1, mul, NINE: tl.constexpr):
    """Take in 64 bytes: one round of the state."""
    x = _rotate(x + y + v0 + bytes_word(data_ptr, place + 8, eight, mask), 37) * mul
    y = _rotate(y + v1 + bytes_word(data_ptr, place + 48, eight, mask), 42) * mul
    x = x ^ (w1 * NINE)
    y = y + v0 * NINE + bytes_word(data_ptr, place + 40, eight, mask)
    z = _rotate(z + w0, 33) * mul
    v0, v1 = _weak32(data_ptr, place, eight, mask, v1 * mul, x + w0)
    w0, w1 = _weak32(data_ptr, place + 32, eight, mask, z + w1, y + bytes_word(data_ptr, place + 16, eight, mask))
    return z, y, x, v0, v1, w0, w1


@jit
def _farm_long(data_ptr, first, size, mask):
    """Hash strings of more than 64 bytes; `mask` excludes all others."""
    k1 = 0xB492B66FBE98F273
    k2 = 0x9AE16A3B2F90404F
    eight = tl.zeros_like(size) + 8
    zero = tl.zeros_like(size).to(tl.uint64)
    x = bytes_word(data_ptr, first, eight, mask) + (zero + 81) * k2
    y = (zero + 81) * k1 + 113
    z = y * k2 + 113
    z = (z ^ (z >> 47)) * k2
    v0, v1, w0, w1 = zero, zero, zero, zero
    last = tl.where(mask, (size - 1) // 64 * 64, 0)
    for at in range(0, largest(last), 64):
        active = at < last
        nx, ny, nz, nv0, nv1, nw0, nw1 = _farm_block(
            data_ptr, first + at, eight, active, x, y, z, v0, v1, w0, w1, zero + k1, 1
        )
        x, y, z = tl.where(active, nx, x), tl.where(active, ny, y), tl.where(active, nz, z)
        v0, v1 = tl.where(active, nv0, v0), tl.where(active, nv1, v1)
        w0, w1 = tl.where(active, nw0, w0), tl.where(active, nw1, w1)
    mul = ((z & 255) << 1) + k1
    w0 = w0 + ((size - 1) & 63).to(tl.uint64)
    v0 = v0 + w0
    w0 = w0 + v0
    x, y, z, v0, v1, w0, w1 = _farm_block(data_ptr, first + size - 64, eight, mask, x, y, z, v0, v1, w0, w1, mul, 9)
    outer = _mix16(v0, w0, mul) + (y ^ (y >> 47)) * 0xC3A5C85C97CB3127 + z
    return _mix16(outer, _mix16(v1, w1, mul) + x, mul)


@jit
def farm_bytes(data_ptr, first, size, mask):
    """Return Fingerprint64 of the strings of a program, uint64."""
    bits = _farm0_16(data_ptr, first, tl.minimum(size, 16), mask)
    longest = largest(tl.where(mask, size, 0))
    if longest > 16:
        some = mask & (size > 16) & (size <= 64)
        bits = tl.where(some, _farm17_64(data_ptr, first, size, some), bits)
    if longest > 64:
        long = mask & (size > 64)
        bits = tl.where(long, _farm_long(data_ptr, first, size, long), bits)
    return bits
