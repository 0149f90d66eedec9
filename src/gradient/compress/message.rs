//! Several codes in one message: the length of each (LEB128: seven bits a byte, lowest first), then
//! the codes.

/// Puts codes together.
#[derive(Debug, Default)]
pub(super) struct Writer {
    lengths: Vec<u8>,
    codes: Vec<u8>,
}

impl Writer {
    /// Appends a code.
    pub fn push(&mut self, code: &[u8]) {
        let mut length = code.len() as u64;
        while length >= 0x80 {
            self.lengths.push(length as u8 | 0x80);
            length >>= 7;
        }
        self.lengths.push(length as u8);
        self.codes.extend_from_slice(code);
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.lengths.append(&mut self.codes);
        self.lengths
    }
}

/// The codes of a message.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    codes: Vec<&'a [u8]>,
}

impl<'a> Reader<'a> {
    /// None for a message that is not of so many codes.
    pub fn new(message: &'a [u8], codes: usize) -> Option<Self> {
        let mut rest = message;
        let mut lengths = Vec::with_capacity(codes.min(message.len()));
        for _ in 0..codes {
            lengths.push(length(&mut rest)?);
        }
        let mut found = Vec::with_capacity(codes);
        for length in lengths {
            let (code, after) = rest.split_at_checked(length)?;
            found.push(code);
            rest = after;
        }
        rest.is_empty().then_some(Self { codes: found })
    }

    /// One code.
    pub fn part(&self, place: usize) -> &'a [u8] {
        self.codes[place]
    }

    /// All codes in order.
    pub fn parts(&self) -> &[&'a [u8]] {
        &self.codes
    }
}

/// Takes a length from the beginning. None if it does not end, or fits no usize.
fn length(rest: &mut &[u8]) -> Option<usize> {
    let mut length = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        let bits = u64::from(byte & 0x7f);
        if shift > 0 && bits > u64::MAX >> shift {
            return None;
        }
        length |= bits << shift;
        if byte & 0x80 == 0 {
            return usize::try_from(length).ok();
        }
    }
    None
}
