// How the blocks of threads of the sm_90a weight gradient share out its work. Runs on a host too.
// Where blocks are in clusters, each cluster is here what is called a block of threads: its blocks
// take the same rows at the same time.
//
// The work of a tile is its blocks of 64 rows, one after another; a block of threads takes `share`
// of them in all. Every tile is cut into as many whole shares as it has, and block by block all
// tiles are at the same rows, which are in L2 then. What is left of each tile is either a part of
// its own, or, where the tiles would otherwise not fill the GPU evenly, strung together with that
// of the others: a block of threads then goes on from the end of one tile into the next.
//
// Each part of a tile has its place in the workspace, by its rows; whoever has a tile's last rows
// also fills the places that no part of this tile needs. Nothing depends on the order in which
// blocks run.
#pragma once

#include "sm90_layout.h"

namespace ghl::cuda::sm90 {

// Rows of one tile that a block of threads takes in a row.
struct Piece {
  int32_t tile, first, blocks;  // blocks of rows; none when all is done
  int32_t part;                 // its place in the workspace
  bool ends;                    // whether it has the tile's last rows
  int64_t at, left;             // among what is strung together: its start, and what then follows
};

struct Schedule {
  int32_t tiles, blocks, share, parts;
  bool strung;

  GHL_HOST_DEVICE int32_t whole() const { return blocks / share; }
  GHL_HOST_DEVICE int32_t rest() const { return blocks % share; }

  GHL_HOST_DEVICE Piece first_piece(int32_t block) const {
    const int32_t part = block / tiles;
    if (strung && part >= whole()) {
      const int64_t at = int64_t(block - whole() * tiles) * share, all = int64_t(tiles) * rest();
      return strung_piece(at, all - at < share ? all - at : share);
    }
    const int32_t first = part * share, left = blocks - first;
    const bool ends = left <= share;
    return {block % tiles, first, ends ? left : share, part, ends, 0, 0};
  }

  GHL_HOST_DEVICE Piece next_piece(const Piece& piece) const {
    if (piece.left == 0) return {0, 0, 0, 0, false, 0, 0};
    return strung_piece(piece.at + piece.blocks, piece.left);
  }

  // `work` blocks of rows from `at` on, or as many as their tile has.
  GHL_HOST_DEVICE Piece strung_piece(int64_t at, int64_t work) const {
    const int32_t tile = int32_t(at / rest()), start = int32_t(at % rest());
    const int32_t left = rest() - start;
    const bool ends = work >= left;
    const int32_t count = ends ? left : int32_t(work);
    const int32_t part = int32_t(at / share - int64_t(tile) * rest() / share);
    return {tile, whole() * share + start, count, whole() + part, ends, at, work - count};
  }

  int64_t blocks_of_threads() const {
    if (!strung) return int64_t(tiles) * parts;
    return int64_t(tiles) * whole() + (int64_t(tiles) * rest() + share - 1) / share;
  }
};

// The parts of a tile if rests are strung together: a rest, shorter than a share, is cut once at
// most.
inline int32_t strung_parts(int32_t blocks, int32_t share) {
  return blocks / share + (blocks % share ? 2 : 0);
}

// `splits` is the number of parts. As many as there are shares: each has its own block of threads;
// more: rests are strung together. No tiles if they would not have places for all.
inline Schedule schedule(const DualWgradParams& p, const Geometry& geometry) {
  Schedule s{};
  s.blocks = int32_t((int64_t(p.rows) + kRows - 1) / kRows);
  s.share = p.rows_per_split / kRows;
  s.parts = p.splits;
  if (p.rows <= 0 || s.share <= 0 || p.rows_per_split % kRows != 0) return s;
  const int32_t shares = s.whole() + (s.rest() > 0);
  s.strung = p.splits > shares;
  const bool fits = s.strung ? p.splits >= strung_parts(s.blocks, s.share) : p.splits == shares;
  if (fits) s.tiles = geometry.neuron_tiles * geometry.column_tiles * p.groups;
  return s;
}

}  // namespace ghl::cuda::sm90
