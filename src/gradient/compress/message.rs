//! The codes of all tensors of a step in one message: the length of each in eight bytes, then
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
        self.lengths.extend((code.len() as u64).to_le_bytes());
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
        let (lengths, mut rest) = message.split_at_checked(codes.checked_mul(8)?)?;
        let mut found = Vec::with_capacity(codes);
        for length in lengths.as_chunks::<8>().0 {
            let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
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
}
