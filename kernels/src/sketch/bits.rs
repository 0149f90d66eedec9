//! A stream of bits in bytes. The first bit is the lowest bit of the first byte.

/// Appends bits to bytes.
pub(super) struct BitWriter<'a> {
    bytes: &'a mut Vec<u8>,
    /// Bits that are not written yet, fewer than 8 between calls.
    held: u64,
    count: u32,
}

/// The largest number of bits of one call.
pub(super) const MOST: u32 = 56;

impl<'a> BitWriter<'a> {
    pub fn new(bytes: &'a mut Vec<u8>) -> Self {
        Self {
            bytes,
            held: 0,
            count: 0,
        }
    }

    /// Appends the lowest `count` bits, at most [`MOST`]; the others have to be 0.
    #[inline(always)]
    pub fn push(&mut self, bits: u64, count: u32) {
        self.held |= bits << self.count;
        self.count += count;
        let whole = (self.count / 8) as usize;
        self.bytes
            .extend_from_slice(&self.held.to_le_bytes()[..whole]);
        self.held = self.held.checked_shr(8 * whole as u32).unwrap_or(0);
        self.count %= 8;
    }

    /// Writes the last bits; the rest of their byte is 0.
    pub fn finish(self) {
        if self.count > 0 {
            self.bytes.push(self.held as u8);
        }
    }
}

/// Reads bits of bytes.
pub(super) struct BitReader<'a> {
    bytes: &'a [u8],
    /// The next bit.
    place: usize,
}

impl<'a> BitReader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, place: 0 }
    }

    /// The next bits without taking them: at least [`MOST`], with zeros beyond the end.
    #[inline(always)]
    fn peek(&self) -> u64 {
        let rest = &self.bytes[(self.place / 8).min(self.bytes.len())..];
        let word = match rest.first_chunk::<8>() {
            Some(bytes) => u64::from_le_bytes(*bytes),
            None => rest
                .iter()
                .rev()
                .fold(0, |word, byte| word << 8 | u64::from(*byte)),
        };
        word >> (self.place % 8)
    }

    /// Takes `count` bits, at most [`MOST`]. `None` beyond the end.
    #[inline(always)]
    pub fn take(&mut self, count: u32) -> Option<u64> {
        let bits = self.peek() & ((1 << count) - 1);
        self.place += count as usize;
        (self.place <= 8 * self.bytes.len()).then_some(bits)
    }

    /// Takes zeros up to a one, and it. Returns how many zeros. `None` if there is no one.
    #[inline(always)]
    pub fn take_unary(&mut self) -> Option<u64> {
        let mut zeros = 0;
        loop {
            let word = self.peek();
            if word != 0 {
                let count = word.trailing_zeros();
                self.place += count as usize + 1;
                return (self.place <= 8 * self.bytes.len()).then_some(zeros + u64::from(count));
            }
            if self.place >= 8 * self.bytes.len() {
                return None;
            }
            zeros += u64::from(MOST);
            self.place += MOST as usize;
        }
    }

    /// The number of bytes of which at least one bit was read.
    pub fn bytes_read(&self) -> usize {
        self.place.div_ceil(8)
    }

    /// Whether the rest of the last byte is 0.
    pub fn ends_in_zeros(&self) -> bool {
        match (self.place % 8, self.bytes.get(self.place / 8)) {
            (0, _) | (_, None) => true,
            (used, Some(byte)) => byte >> used == 0,
        }
    }
}
