//! A search allocates its output and a few tiles, however many tokens it is given.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use vqrae_kernels::{Codebook, Metric};

/// The system's allocator, counting the bytes in use and their peak.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to `System` unchanged; counting touches only atomics. The provided
// `alloc_zeroed` and `realloc` are built on these two.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let in_use = IN_USE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(in_use, Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract, which is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `pointer` came from `alloc` above with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const WIDTH: usize = 8;
const CODES: usize = 4096;

/// Values in [-1, 1) that do not repeat.
fn values(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| i.wrapping_mul(0x9E37_79B1) as i32 as f32 / 2f32.powi(31)).collect()
}

/// Peak bytes of one search, less its 4-byte codes.
fn extra(codebook: &Codebook, tokens: usize) -> usize {
    let z = values(tokens * WIDTH);
    let before = IN_USE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let codes = codebook.nearest(&z).unwrap();
    assert_eq!(codes.len(), tokens);
    PEAK.load(Relaxed) - before - tokens * size_of::<u32>()
}

#[test]
fn memory_does_not_grow_with_the_number_of_tokens() {
    let codebook = Codebook::new(values(CODES * WIDTH), WIDTH, Metric::Euclidean).unwrap();
    // Starts the threads, whose stacks and queues stay.
    extra(&codebook, 4096);
    let few = extra(&codebook, 4_096);
    let many = extra(&codebook, 262_144);
    let threads = rayon::current_num_threads();
    let score_tile = 512 * 256 * size_of::<f32>();
    assert!(many < 8 * threads * score_tile, "got {many} bytes on {threads} threads");
    // Candidate lists grow with their luck, by no more than a part of a tile.
    let allowed = few + threads * score_tile / 4;
    assert!(many <= allowed, "4,096 tokens: {few} bytes, 262,144 tokens: {many} bytes, allowed: {allowed}");
}
