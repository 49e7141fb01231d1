//! TensorBoard's event files: Event messages (tensorflow/core/util/event.proto) in TFRecord frames.
//!
//! ```text
//! length u64 LE │ masked CRC-32C of it u32 LE │ the message │ masked CRC-32C of it u32 LE
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes scalars. A run that goes on writes another file, whose first message tells the reader to forget what older files
/// say of the steps after it.
#[derive(Debug)]
pub(super) struct Events {
    file: File,
}

impl Events {
    /// A new file in `folder`, of a run that goes on from `step`.
    pub(super) fn create(folder: &Path, step: usize) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let now = seconds();
        let name =
            |i: u32| format!("events.out.tfevents.{:010}.{:06}.{i}.vqrae", now as u64, std::process::id() % 1_000_000);
        let open = |i: u32| File::options().write(true).create_new(true).open(folder.join(name(i)));
        let mut made = open(0);
        for i in 1..100 {
            if !made.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists) {
                break;
            }
            made = open(i);
        }
        let mut events = Self { file: made? };
        let mut version = event(now, 0);
        text(&mut version, 3, b"brain.Event:2");
        events.frame(&version)?;
        // SessionLog { status: START }
        let mut start = event(now, step);
        text(&mut start, 7, &[0x08, 1]);
        events.frame(&start)?;
        Ok(events)
    }

    /// Scalars of a step, by their tags.
    pub(super) fn scalars<'a>(
        &mut self,
        step: usize,
        values: impl Iterator<Item = (String, f64)> + 'a,
    ) -> io::Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut message = Vec::new();
            text(&mut message, 1, tag.as_bytes());
            message.push(2 << 3 | 5);
            message.extend((value as f32).to_le_bytes());
            text(&mut summary, 1, &message);
        }
        let mut message = event(seconds(), step);
        text(&mut message, 5, &summary);
        self.frame(&message)
    }

    fn frame(&mut self, message: &[u8]) -> io::Result<()> {
        let length = (message.len() as u64).to_le_bytes();
        let mut frame = length.to_vec();
        frame.extend(masked(crc32c(&length)).to_le_bytes());
        frame.extend(message);
        frame.extend(masked(crc32c(message)).to_le_bytes());
        // One write a frame: a reader that looks on sees whole ones.
        self.file.write_all(&frame)
    }
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// An Event's wall time and step.
fn event(time: f64, step: usize) -> Vec<u8> {
    let mut message = vec![1 << 3 | 1];
    message.extend(time.to_le_bytes());
    message.push(2 << 3);
    varint(&mut message, step as u64);
    message
}

/// A field of bytes.
fn text(message: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    message.push(field << 3 | 2);
    varint(message, bytes.len() as u64);
    message.extend(bytes);
}

fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

/// CRC-32C (Castagnoli), bit by bit: messages are a few hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

/// TFRecord's mask, so that a checksum of data that holds checksums is sound.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        // RFC 3720, B.4
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn a_file_parses_back_to_its_scalars() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = Events::create(folder.path(), 300).unwrap();
        events.scalars(301, [("loss".to_string(), 0.5), ("rate/decoder".to_string(), 2.0)].into_iter()).unwrap();
        // A second file in the same second gets a name of its own.
        Events::create(folder.path(), 0).unwrap();
        let mut paths: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        assert_eq!(paths.len(), 2);

        let bytes = std::fs::read(&paths[0]).unwrap();
        let (mut rest, mut messages) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let sum = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
            assert_eq!(sum(8), masked(crc32c(&rest[..8])));
            let message = &rest[12..12 + length];
            assert_eq!(sum(12 + length), masked(crc32c(message)));
            messages.push(message.to_vec());
            rest = &rest[16 + length..];
        }
        assert_eq!(messages.len(), 3);
        assert!(messages[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        // Step 300 is 0xac 0x02 as a varint.
        assert_eq!(messages[1][9..], [0x10, 0xac, 0x02, 0x3a, 2, 8, 1]);
        let mut scalars = vec![0x2a, 13 + 21, 0x0a, 11, 0x0a, 4];
        scalars.extend(b"loss\x15");
        scalars.extend(0.5f32.to_le_bytes());
        scalars.extend([0x0a, 19, 0x0a, 12]);
        scalars.extend(b"rate/decoder\x15");
        scalars.extend(2f32.to_le_bytes());
        assert_eq!(messages[2][12..], scalars[..], "{:?}", messages[2]);
    }
}
