//! A search allocates its output and a few blocks of tokens and scores, however many tokens it is given.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use vqrae_kernels::cpu::Isa;
use vqrae_kernels::nearest::Precision;
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
    let threads = rayon::current_num_threads();
    // A block of 384 tokens, some of their scores and what is known of them; their lists of candidates at the longest; and
    // what is screened again at a time. The matrix of all scores would take 1 GiB.
    let block = 384 * 64 * size_of::<f32>() + 96 * 64 * size_of::<f32>() + 384 * 512;
    let lists = 384 * 256 * 16;
    let again = 4096 * (WIDTH * size_of::<f32>() + 64);
    for precision in [Precision::F32, Precision::Bf16] {
        let rows = values(CODES * WIDTH);
        let isa = Isa::detect().unwrap();
        let codebook = Codebook::screened(rows, WIDTH, Metric::Euclidean, isa, precision).unwrap();
        // Starts the threads, whose stacks and queues stay, and makes a finer screen where tokens need it.
        extra(&codebook, 4_096);
        let few = extra(&codebook, 4_096);
        let many = extra(&codebook, 65_536);
        assert!(many < threads * (block + lists) + again, "{precision:?}: {many} bytes on {threads} threads");
        // Lists grow with their luck.
        let allowed = few + threads * lists;
        assert!(many <= allowed, "{precision:?}: {few} bytes for 4,096 tokens, {many} for 65,536, allowed: {allowed}");
    }
}
