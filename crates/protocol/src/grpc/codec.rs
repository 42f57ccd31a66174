//! Sends messages encoded by prost and receives them as bytes, so the receiver can answer an
//! undecodable one.

use std::marker::PhantomData;

use bytes::{Buf, Bytes};
use prost::Message;
use tonic::Status;
use tonic::codec::{DecodeBuf, Decoder, EncodeBuf, Encoder};

/// Sends `M` and receives bytes.
pub(super) struct Codec<M>(PhantomData<fn() -> M>);

impl<M> Codec<M> {
    pub(super) const fn new() -> Self {
        Self(PhantomData)
    }
}

impl<M: Message + 'static> tonic::codec::Codec for Codec<M> {
    type Encode = M;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self::new()
    }

    fn decoder(&mut self) -> Self {
        Self::new()
    }
}

impl<M: Message + 'static> Encoder for Codec<M> {
    type Item = M;
    type Error = Status;

    fn encode(&mut self, item: M, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(out).map_err(|error| Status::internal(error.to_string()))
    }
}

impl<M> Decoder for Codec<M> {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, input: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(input.copy_to_bytes(input.remaining())))
    }
}
