//! The fields in the bytes of a message, without decoding it.

use std::str;

/// The value of a field, as far as its type on the wire determines it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FieldValue<'a> {
    /// A varint.
    Number(u64),
    /// Text, bytes, or a message.
    Bytes(&'a [u8]),
    /// 8 or 4 bytes.
    Fixed,
}

impl<'a> FieldValue<'a> {
    /// The value as text, if it is valid UTF-8.
    pub(super) fn text(self) -> Option<&'a str> {
        self.bytes().and_then(|bytes| str::from_utf8(bytes).ok())
    }

    /// The value as bytes, or as a message.
    pub(super) fn bytes(self) -> Option<&'a [u8]> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// The value as a number.
    pub(super) fn number(self) -> Option<u64> {
        match self {
            Self::Number(number) => Some(number),
            _ => None,
        }
    }
}

/// Iterates over the numbers and values of the fields. Ends at the first invalid field.
#[derive(Clone, Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    /// The value of the last field with this number, which is the one that counts.
    pub(super) fn last_of(&self, number: u32) -> Option<FieldValue<'a>> {
        self.clone().filter(|(found, _)| *found == number).last().map(|(_, value)| value)
    }

    fn number(&mut self) -> Option<u64> {
        // Most varints are lengths below 128.
        if let Some((&byte @ ..0x80, rest)) = self.0.split_first() {
            self.0 = rest;
            return Some(byte.into());
        }
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            if shift == 63 && byte > 1 {
                return None;
            }
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    fn bytes(&mut self, len: u64) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(usize::try_from(len).ok()?)?;
        self.0 = rest;
        Some(bytes)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = (u32, FieldValue<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let key = u32::try_from(self.number()?).ok().filter(|key| key >> 3 != 0)?;
        let value = match key & 7 {
            0 => FieldValue::Number(self.number()?),
            1 => self.bytes(8).map(|_| FieldValue::Fixed)?,
            2 => {
                let len = self.number()?;
                FieldValue::Bytes(self.bytes(len)?)
            }
            5 => self.bytes(4).map(|_| FieldValue::Fixed)?,
            _ => return None,
        };
        Some((key >> 3, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn finds_fields_with_their_values() {
        let bytes = [0x08, 0x96, 0x01, 0x12, 2, b'h', b'i', 0x1d, 0, 0, 0, 0, 0x08, 1];
        let fields: Vec<_> = Fields(&bytes).collect();
        assert_eq!(
            fields,
            [(1, FieldValue::Number(150)), (2, FieldValue::Bytes(b"hi")), (3, FieldValue::Fixed), (1, FieldValue::Number(1))]
        );
        assert_eq!(Fields(&bytes).last_of(1), Some(FieldValue::Number(1)));
        assert_eq!(Fields(&bytes).last_of(2).and_then(FieldValue::text), Some("hi"));
    }

    #[test]
    fn a_truncated_field_ends_the_fields() {
        assert_eq!(Fields(&[0x08, 1, 0x12, 9, b'x']).count(), 1);
        assert_eq!(Fields(&[0xff; 20]).count(), 0);
        assert_eq!(Fields(&[0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]).count(), 0);
    }

    proptest! {
        #[test]
        fn any_bytes_are_accepted_or_rejected(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Fields(&bytes).count();
        }
    }
}
