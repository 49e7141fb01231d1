//! Products with AMX: tiles of 16 rows of 64 bytes, and one instruction that multiplies two of them in bf16.
//!
//! The instructions are written in `asm!`, since Rust's intrinsics for them are not stable. Every block of work loads its
//! tile configuration and releases it at its end, so no state is left behind on the thread.

use std::arch::asm;
use std::sync::OnceLock;

use super::{Block, PANEL};
use crate::cpu::{Bf16, Element};

/// Rows of a tile.
const TILE: usize = 16;
/// bf16 numbers in a row of a tile, the inner width of one instruction.
const WIDTH: usize = Bf16::STEP;
/// Inner width that two tiles' rows of `a` keep in the first-level cache while panels stream past them.
const DEPTH: usize = 512;

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_of_a_row: [u16; 16],
    rows: [u8; 16],
}

impl Configuration {
    /// Tiles 0 and 1 are sums of the upper rows, 2 and 3 of the lower; 4 and 5 hold `a`; 6 and 7 hold `b`.
    fn new(upper: usize, lower: usize) -> Self {
        let mut configuration =
            Self { palette: 1, start_row: 0, reserved: [0; 14], bytes_of_a_row: [0; 16], rows: [0; 16] };
        let rows = [upper, upper, lower, lower, upper, lower, TILE, TILE];
        for (tile, rows) in rows.into_iter().enumerate() {
            configuration.bytes_of_a_row[tile] = 64;
            configuration.rows[tile] = rows as u8;
        }
        configuration
    }
}

/// Whether the processor has AMX in bf16, the system allows it, and it multiplies as it should.
pub(in crate::cpu) fn is_usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| is_present() && is_permitted() && multiplies())
}

/// CPUID leaf 7: AMX-BF16 is bit 22 of EDX, AMX-TILE bit 24; leaf 1: OSXSAVE is bit 27 of ECX; XCR0 bits 17 and 18 say
/// that the system saves tiles (Intel's manual, volume 1, 18.1).
fn is_present() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    const OSXSAVE: u32 = 1 << 27;
    const TILE_STATE: u32 = 1 << 17 | 1 << 18;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 || __cpuid_count(7, 0).edx & BF16_AND_TILE != BF16_AND_TILE {
        return false;
    }
    let xcr0: u32;
    // SAFETY: OSXSAVE says that xgetbv is allowed.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") xcr0, out("edx") _, options(nomem, nostack)) };
    xcr0 & TILE_STATE == TILE_STATE
}

/// Asks Linux to let this process use the tile registers (Documentation/arch/x86/xstate.rst).
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: this call reads and writes no memory of ours; it only widens what the process may use.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack)
        );
    }
    result == 0
}

/// Other systems have other ways to ask, or none.
#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// A small product whose sums are exact, against a plain loop: a processor or a virtual machine that gets it wrong is not
/// used.
fn multiplies() -> bool {
    const ROWS: usize = TILE + 5;
    let value = |i: usize| (i * 7 % 23) as f32 - 11.0;
    let a: Vec<Bf16> = (0..ROWS * WIDTH).map(|i| Bf16::narrow(value(i))).collect();
    let b: Vec<Bf16> = (0..WIDTH * PANEL).map(|i| Bf16::narrow(value(i + 3))).collect();
    let mut c = vec![f32::NAN; ROWS * PANEL];
    let block = Block {
        a: a.as_ptr(),
        a_stride: WIDTH,
        rows: ROWS,
        b: b.as_ptr(),
        panel_stride: b.len(),
        panels: 1,
        inner: WIDTH,
        c: c.as_mut_ptr(),
        c_stride: PANEL,
    };
    // SAFETY: the block describes the three arrays; presence and permission were checked before.
    unsafe { multiply(&block) };
    (0..ROWS * PANEL).all(|i| {
        let (row, column) = (i / PANEL, i % PANEL);
        let product = |d: usize| a[row * WIDTH + d].widen() * b[(d / 2 * PANEL + column) * 2 + d % 2].widen();
        c[i] == (0..WIDTH).map(product).sum::<f32>()
    })
}

/// Computes a block.
///
/// # Safety
/// As [`super::Kernel`]; AMX must be present and permitted.
pub(super) unsafe fn multiply(block: &Block<Bf16>) {
    let mut configured = (0, 0);
    let mut waste = [0f32; TILE * PANEL];
    for depth in (0..block.inner).step_by(DEPTH) {
        let steps = (block.inner - depth).min(DEPTH).div_ceil(WIDTH);
        for row in (0..block.rows).step_by(2 * TILE) {
            let left = block.rows - row;
            let (upper, lower) = (left.min(TILE), left.saturating_sub(TILE).min(TILE));
            // A tile cannot have no rows: without lower rows the upper ones are computed twice, into a tile of waste.
            let rows = (upper, if lower == 0 { upper } else { lower });
            if configured != rows {
                let configuration = Configuration::new(rows.0, rows.1);
                // SAFETY: a valid configuration of palette 1.
                unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack)) };
                configured = rows;
            }
            for panel in (0..block.panels).step_by(2) {
                // SAFETY: rows, panels and depth stay within the block.
                unsafe { tiles(block, row, lower > 0, panel, depth, steps, &mut waste) };
            }
        }
    }
    if configured != (0, 0) {
        // SAFETY: returns the tiles to their initial state.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Two by two tiles of sums, over `steps` steps of the inner dimension from `depth` on; added to `c` but for the first.
unsafe fn tiles(
    block: &Block<Bf16>,
    row: usize,
    has_lower: bool,
    panel: usize,
    depth: usize,
    steps: usize,
    waste: &mut [f32; TILE * PANEL],
) {
    let has_right = panel + 1 < block.panels;
    // SAFETY: within the block, as the caller promises; where there is no second row or column of tiles, the first is read
    // again and `waste`, which holds a whole tile, is written.
    unsafe {
        let a0 = block.a.add(row * block.a_stride + depth);
        let a1 = if has_lower { a0.add(TILE * block.a_stride) } else { a0 };
        let b0 = block.b.add(panel * block.panel_stride + depth * PANEL);
        let b1 = if has_right { b0.add(block.panel_stride) } else { b0 };
        let bytes = block.c_stride * size_of::<f32>();
        let c00 = block.c.add(row * block.c_stride + panel * PANEL);
        let spare = (waste.as_mut_ptr(), PANEL * size_of::<f32>());
        let (c01, bytes01) = if has_right { (c00.add(PANEL), bytes) } else { spare };
        let (c10, bytes10) = if has_lower { (c00.add(TILE * block.c_stride), bytes) } else { spare };
        let (c11, bytes11) = if has_lower && has_right { (c10.add(PANEL), bytes) } else { spare };
        if depth == 0 {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        } else {
            asm!(
                "tileloadd tmm0, [{c00} + {s00}]",
                "tileloadd tmm1, [{c01} + {s01}]",
                "tileloadd tmm2, [{c10} + {s10}]",
                "tileloadd tmm3, [{c11} + {s11}]",
                c00 = in(reg) c00, c01 = in(reg) c01, c10 = in(reg) c10, c11 = in(reg) c11,
                s00 = in(reg) bytes, s01 = in(reg) bytes01, s10 = in(reg) bytes10, s11 = in(reg) bytes11,
                options(nostack, readonly)
            );
        }
        asm!(
            "2:",
            "tileloadd tmm4, [{a0} + {a_bytes}]",
            "tileloadd tmm6, [{b0} + {b_bytes}]",
            "tileloadd tmm7, [{b1} + {b_bytes}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a1} + {a_bytes}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {a0}, 64",
            "add {a1}, 64",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {steps}",
            "jnz 2b",
            a0 = inout(reg) a0 => _, a1 = inout(reg) a1 => _, b0 = inout(reg) b0 => _, b1 = inout(reg) b1 => _,
            steps = inout(reg) steps => _,
            a_bytes = in(reg) block.a_stride * size_of::<Bf16>(),
            b_bytes = in(reg) 64usize,
            options(nostack, readonly)
        );
        asm!(
            "tilestored [{c00} + {s00}], tmm0",
            "tilestored [{c01} + {s01}], tmm1",
            "tilestored [{c10} + {s10}], tmm2",
            "tilestored [{c11} + {s11}], tmm3",
            c00 = in(reg) c00, c01 = in(reg) c01, c10 = in(reg) c10, c11 = in(reg) c11,
            s00 = in(reg) bytes, s01 = in(reg) bytes01, s10 = in(reg) bytes10, s11 = in(reg) bytes11,
            options(nostack)
        );
    }
}
